"""One HTTP exchange: its request id, its response, its errors as OpenAI error objects.

`Exchange` wraps the three ASGI values of one request; every response of the gateway is written through it in O(body),
so the request id, the metrics and the shape of errors are the same everywhere. Knows nothing of models or of routes'
contents.
"""

from __future__ import annotations

import itertools
import math
import re
import secrets
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import msgspec

from llmscale.errors import LlmscaleError, MethodNotAllowed, Overloaded, RequestError, RequestFailed
from llmscale.gateway.asgi import Receive, Scope, Send
from llmscale.gateway.body import header
from llmscale.gateway.openai import Error, ErrorResponse
from llmscale.logs import get_logger
from llmscale.metrics import GatewayMetrics

_log = get_logger("llmscale.gateway")
_SANE_ID: Final = re.compile(rb"[A-Za-z0-9_.-]{1,64}")
_json = msgspec.json.Encoder()
_process: Final = secrets.token_hex(6)
_counter = itertools.count()
_ERROR_TYPES: Final = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}
# After these the rest of the body is still under way; closing is cheaper and safer than reading it.
_CLOSING: Final = frozenset({408, 413, 431})
_LARGE_BODY_BYTES: Final = 1 << 20
Headers = Sequence[tuple[bytes, bytes]]


def error_type(status: int) -> str:
    """OpenAI's `type` for a status."""
    return _ERROR_TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")


def error_body(error: LlmscaleError) -> bytes:
    """An OpenAI error object as JSON."""
    param = error.field if isinstance(error, RequestError) else None
    return _json.encode(ErrorResponse(Error(str(error), error_type(error.http_status), param, error.code)))


def trace_of(error: BaseException) -> dict[str, str]:
    """Where a defect showed, for the log: its type and frames, but neither its message nor values, which may be a
    prompt."""
    frames = traceback.extract_tb(error.__traceback__)
    return {
        "error": type(error).__name__,
        "frames": " > ".join(f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in frames),
    }


class Exchange:
    """One request and the response to it."""

    __slots__ = ("_metrics", "_request_id", "_send", "part", "receive", "route", "scope", "started")

    def __init__(
        self, scope: Scope, receive: Receive, send: Send, metrics: GatewayMetrics, *, route: str, part: str
    ) -> None:
        self.scope = scope
        self.receive = receive
        self._send = send
        self.route = route
        self.part = part
        self._metrics = metrics
        self._request_id: str | None = None
        self.started = False

    @property
    def request_id(self) -> str:
        """The client's X-Request-Id if it is short and plain, else one of ours."""
        if self._request_id is None:
            given = header(self.scope, b"x-request-id")
            if given is not None and _SANE_ID.fullmatch(given):
                self._request_id = given.decode()
            else:
                self._request_id = f"{_process}{next(_counter):08x}"
        return self._request_id

    async def start(self, status: int, headers: Headers) -> None:
        """Sends the status line and the headers."""
        self.started = True
        self._metrics.http_request(self.route, status)
        extra = (b"x-request-id", self.request_id.encode())
        await self._send({"type": "http.response.start", "status": status, "headers": [*headers, extra]})

    async def write(self, body: bytes, *, more: bool = False) -> None:
        """Sends a part of the body; waits while the client does not read."""
        await self._send({"type": "http.response.body", "body": body, "more_body": more})

    async def respond(
        self, body: bytes, *, status: int = 200, kind: bytes = b"application/json", headers: Headers = ()
    ) -> None:
        """Sends a whole response."""
        length = (b"content-length", b"%d" % len(body))
        await self.start(status, [(b"content-type", kind), length, *headers])
        if len(body) <= _LARGE_BODY_BYTES:
            await self.write(body)
            return
        await self.write(body, more=True)
        # Returns when the client has read nearly all: until then the answer counts as one that is not sent.
        await self.write(b"")

    async def fail(self, error: LlmscaleError) -> None:
        """Sends an error as the whole response."""
        headers: list[tuple[bytes, bytes]] = []
        if isinstance(error, Overloaded):
            headers.append((b"retry-after", b"%d" % max(1, math.ceil(error.retry_after_seconds))))
        if isinstance(error, RequestFailed):
            # OpenAI's clients send every 5xx again, twice. What killed two workers would kill two with each.
            headers.append((b"x-should-retry", b"false"))
        if isinstance(error, MethodNotAllowed):
            headers.append((b"allow", ", ".join(error.allowed).encode()))
        if error.http_status == 401:
            headers.append((b"www-authenticate", b"Bearer"))
        if error.http_status in _CLOSING:
            headers.append((b"connection", b"close"))
        await self.respond(error_body(error), status=error.http_status, headers=headers)

    async def crash(self, error: BaseException) -> None:
        """Logs a defect and, if nothing was sent yet, answers with an error that tells nothing about the process."""
        _log.error("a request failed in the gateway", request_id=self.request_id, **trace_of(error))
        if not self.started:
            await self.fail(LlmscaleError(f"the gateway failed; its log has the request id {self.request_id}"))
