"""Lets pages of other origins call the API, where the operator lists them (CORS).

A browser asks first whether a page may (a preflight, which has no key) and shows the page only what an answer allows.
Starlette's middleware does both around the gateway, in O(header fields) per request, and changes nothing else of it:
keys, bounds and streams are as without. No cookie or other credential of the browser is ever allowed along, so a page
has the key that it was given and nothing more. Knows nothing of routes.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Final

from llmscale.gateway.asgi import Receive, Scope, Send
from llmscale.origins import EVERY_ORIGIN

Application = Callable[[Scope, Receive, Send], Awaitable[None]]

_METHODS: Final = ("GET", "HEAD", "POST")
# Official clients send a dozen of their own, which change with their versions. The gateway reads three and no others.
_ANY_HEADER: Final = ("*",)
# What clients act on beside the status, and browsers would keep from the page.
_SHOWN_HEADERS: Final = ("X-Request-Id", "Retry-After", "X-Should-Retry")
_MAX_AGE_SECONDS: Final = 600


def for_pages_of(origins: Sequence[str], gateway: Application) -> Application:
    """The gateway for pages of these origins too; the gateway itself where there are none."""
    if not origins:
        return gateway
    from starlette.middleware.cors import CORSMiddleware

    return CORSMiddleware(
        gateway,
        allow_origins=(EVERY_ORIGIN,) if EVERY_ORIGIN in origins else frozenset(origins),
        allow_methods=_METHODS,
        allow_headers=_ANY_HEADER,
        allow_credentials=False,
        expose_headers=_SHOWN_HEADERS,
        max_age=_MAX_AGE_SECONDS,
    )
