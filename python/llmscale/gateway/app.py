"""The routes of the gateway, on one screen, and who may use them.

Every route names its access: open, or with a key when keys are configured. Paths match exactly (one dictionary look-up)
or by one opaque last part, so an unknown path is a 404 before its body is read, whatever a proxy thinks of it. Without
keys, requests must name this machine as their host, so that a web page cannot reach the model through a browser. Knows
nothing of what the routes compute.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

from llmscale.errors import ForeignHost, LlmscaleError, MethodNotAllowed, NotFound
from llmscale.gateway import generate, info, tokenize
from llmscale.gateway.asgi import Receive, Scope, Send
from llmscale.gateway.auth import ApiKeys
from llmscale.gateway.body import ClientDisconnected, header
from llmscale.gateway.config import GatewayConfig, ServedModel, is_loopback
from llmscale.gateway.front import Front, SamplingFactory
from llmscale.gateway.http import Exchange
from llmscale.gateway.services import Services
from llmscale.logs import get_logger

_log = get_logger("llmscale.gateway")
Endpoint = Callable[[Services, Exchange, str], Awaitable[None]]

OPEN: Final = False
KEY: Final = True
# A route that ends in "/*" takes one more part, which the endpoint gets as `exchange.part`.
ROUTES: Final[tuple[tuple[str, str, Endpoint, bool], ...]] = (
    ("POST", "/v1/completions", generate.completions, KEY),
    ("POST", "/v1/chat/completions", generate.chat_completions, KEY),
    ("POST", "/tokenize", tokenize.tokenize, KEY),
    ("POST", "/detokenize", tokenize.detokenize, KEY),
    ("GET", "/v1/models", info.models, KEY),
    ("GET", "/v1/models/*", info.model, KEY),
    ("GET", "/fleet", info.fleet, KEY),
    ("POST", "/fleet/kill/*", info.kill_worker, KEY),
    ("GET", "/metrics", info.metrics, KEY),
    ("GET", "/openapi.json", info.openapi, OPEN),
    ("GET", "/health", info.ready, OPEN),
    ("GET", "/health/live", info.live, OPEN),
    ("GET", "/health/ready", info.ready, OPEN),
    ("GET", "/", info.chat_page, OPEN),
    ("GET", "/page/*", info.page_file, OPEN),
)
_PART: Final = re.compile(r"[A-Za-z0-9_.-][A-Za-z0-9_./:-]{0,255}")
_HOST_PORT: Final = re.compile(rb"(\[[0-9a-fA-F:.]{2,45}\]|[A-Za-z0-9.-]{1,253})(?::[0-9]{1,5})?")


class Gateway:
    """The ASGI application."""

    def __init__(
        self,
        config: GatewayConfig,
        front: Front,
        sampling: SamplingFactory,
        models: Sequence[ServedModel],
        keys: ApiKeys,
    ) -> None:
        self.services = Services(config, front, sampling, models, keys, routes=[path for _, path, _, _ in ROUTES])
        self._routes = {path: (method, endpoint, needs_key) for method, path, endpoint, needs_key in ROUTES}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await self._serve(scope, receive, send)
        elif scope["type"] == "lifespan":
            await self._live(receive, send)
        else:
            raise NotImplementedError(f"the gateway speaks HTTP, not {scope['type']}")

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        services = self.services
        path: str = scope["path"]
        route, part = path, ""
        entry = self._routes.get(path)
        if entry is None or path.endswith("*"):
            route, part = self._with_part(path)
            entry = self._routes.get(route)
        exchange = Exchange(scope, receive, send, services.metrics, route=route, part=part)
        try:
            endpoint, tenant = self._admit(scope, entry)
            await endpoint(services, exchange, tenant)
        except LlmscaleError as error:
            if exchange.started:
                await exchange.crash(error)
            else:
                await exchange.fail(error)
        except ClientDisconnected:
            pass
        except Exception as error:  # noqa: BLE001 - the last frame of a request; it is logged and answered
            await exchange.crash(error)

    def _admit(self, scope: Scope, entry: tuple[str, Endpoint, bool] | None) -> tuple[Endpoint, str]:
        """The endpoint and the tenant who may use it. Raises what the response must say otherwise."""
        if entry is None:
            raise NotFound("there is no such path; /openapi.json lists them")
        method, endpoint, needs_key = entry
        allowed = ("GET", "HEAD") if method == "GET" else (method,)
        if scope["method"] not in allowed:
            raise MethodNotAllowed(f"this path takes {' and '.join(allowed)} only", allowed=allowed)
        if not needs_key:
            return endpoint, ""
        keys = self.services.keys
        if not keys.required and not _is_local(
            header(scope, b"host"), header(scope, b"origin"), self.services.config.host
        ):
            raise ForeignHost(
                "without an API key only this machine may ask: the Host header must be localhost or 127.0.0.1,"
                " and a page that asks must come from there"
            )
        return endpoint, keys.tenant_of(header(scope, b"authorization"))

    def _with_part(self, path: str) -> tuple[str, str]:
        for route in ("/v1/models/", "/fleet/kill/", "/page/"):
            part = path[len(route) :]
            if path.startswith(route) and _PART.fullmatch(part) and ".." not in part:
                return f"{route}*", part
        return "other", ""

    async def _live(self, receive: Receive, send: Send) -> None:
        await receive()
        self.services.open()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        self.services.close()
        await send({"type": "lifespan.shutdown.complete"})


@functools.lru_cache(maxsize=256)
def _is_local(host: bytes | None, origin: bytes | None, listening: str) -> bool:
    """A page on the internet can point its own name at this machine; then the browser sends that name as the host."""
    match = _HOST_PORT.fullmatch(host) if host is not None else None
    if match is None or not (is_loopback(name := match[1].decode()) or name == listening):
        return False
    return origin is None or origin.partition(b"://")[2] == host
