"""Origins of web pages that may call the API: what can be listed. A list is checked in O(its size).

Browsers send the origin of a page as one plain text, and it is compared as that, so what is listed must be written as
they write it. Knows nothing of HTTP.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

MAX_ORIGINS: Final = 64
EVERY_ORIGIN: Final = "*"
_ORIGIN: Final = re.compile(
    r"([a-z][a-z0-9+.-]{0,31})://(?:\[[0-9a-f:.]{2,45}\]|[a-z0-9_-][a-z0-9._-]{0,252})(?::([1-9][0-9]{0,4}))?"
)
_USUAL_PORTS: Final = {"http": "80", "https": "443"}
_MAX_SHOWN: Final = 80


def wrong_origins(origins: Sequence[str]) -> str | None:
    """What is wrong with a list of origins, the value at fault and what would be right; None for a good list."""
    if len(origins) > MAX_ORIGINS:
        return f"it has {len(origins)} origins, the limit is {MAX_ORIGINS}; list fewer, or {EVERY_ORIGIN} alone"
    if EVERY_ORIGIN in origins and len(origins) > 1:
        return f"{EVERY_ORIGIN} stands for every origin already; leave the others out, or it"
    for origin in origins:
        if origin != EVERY_ORIGIN and not _is_origin(origin):
            shown = repr(origin if len(origin) <= _MAX_SHOWN else f"{origin[:_MAX_SHOWN]}...")
            return (
                f"{shown} is no origin as browsers send it: write SCHEME://HOST or SCHEME://HOST:PORT, in lower case,"
                " without path, slash at the end or the scheme's usual port, as https://app.example or"
                f" http://localhost:3000; {EVERY_ORIGIN} alone is every page"
            )
    return None


def _is_origin(text: str) -> bool:
    match = _ORIGIN.fullmatch(text)
    if match is None:
        return False
    scheme, port = match[1], match[2]
    return port is None or (int(port) <= 65_535 and port != _USUAL_PORTS.get(scheme))
