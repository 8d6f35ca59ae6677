"""Reads a request's body within its limits, before anything looks at it.

Size, time, UTF-8 and nesting are checked in that order, each in time linear in the bytes received, and nothing beyond
the limit is kept; all bodies that are still arriving share one bound. Knows nothing of what the body means.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterable
from typing import Final

from llmscale.errors import ArrivalTimeout, InvalidField, Overloaded, PayloadTooLarge, UnsupportedMediaType
from llmscale.gateway.asgi import Receive, Scope
from llmscale.gateway.config import GatewayLimits
from llmscale.gateway.connection import body_complete

MAX_ARRIVING_BYTES: Final = 256 << 20
"""Of all bodies that are being read at once, beside what each may hold anyway."""
# What each body may hold beside the common bound, so that large slow ones do not keep out small ones. As much waits in
# the server for each connection.
_FREE_BYTES: Final = 64 << 10
_STRINGS: Final = re.compile(rb'"(?:[^"\\]|\\.)*+"?', re.DOTALL)
_NO_BRACKETS: Final = bytes(value for value in range(256) if value not in b"[]{}")
_ONE_KIND: Final = bytes.maketrans(b"{}", b"[]")


class ClientDisconnected(Exception):
    """The client closed its connection before its body was complete."""


def header(scope: Scope, name: bytes) -> bytes | None:
    """The first header of that name; ASGI servers give names in lower case."""
    headers: Iterable[tuple[bytes, bytes]] = scope["headers"]
    for key, value in headers:
        if key == name:
            return value
    return None


class Arriving:
    """What the bodies hold that one gateway is reading."""

    __slots__ = ("held_bytes",)

    def __init__(self) -> None:
        self.held_bytes = 0

    def grow(self, counted: int, size: int) -> int:
        """Counts a body that has grown to `size`; `counted` is what counts of it so far. Returns what counts now."""
        more = max(0, size - _FREE_BYTES) - counted
        # One body alone is bounded by its own limit.
        if self.held_bytes > counted and self.held_bytes + more > MAX_ARRIVING_BYTES:
            raise Overloaded(
                f"bodies of {self.held_bytes} bytes are arriving, with the next {more} of this one they are more than"
                f" {MAX_ARRIVING_BYTES}; retry in a second, or send less",
                retry_after_seconds=1.0,
            )
        self.held_bytes += more
        return counted + more


async def read_body(scope: Scope, receive: Receive, limits: GatewayLimits, arriving: Arriving) -> bytes:
    """The whole body, checked. Raises `PayloadTooLarge`, `ArrivalTimeout`, `UnsupportedMediaType`, `InvalidField`, or
    `Overloaded` while too much of other bodies is arriving."""
    kind = header(scope, b"content-type")
    # Browsers send other types across origins without asking first, so this also keeps foreign pages out.
    if kind is None or kind.partition(b";")[0].strip().lower() != b"application/json":
        raise UnsupportedMediaType("the content type must be application/json")
    length = header(scope, b"content-length")
    if length is not None and length.isdigit() and int(length) > limits.max_body_bytes:
        raise _too_large(int(length), limits)
    if body_complete(scope):
        # Most bodies arrive with their header; they do not pay 5 us for a timer.
        body = await _read_all(receive, limits, arriving)
    else:
        try:
            async with asyncio.timeout(limits.max_body_seconds):
                body = await _read_all(receive, limits, arriving)
        except TimeoutError as error:
            raise ArrivalTimeout(f"the body did not arrive within {limits.max_body_seconds:g} s") from error
    check_text(body, limits.max_json_depth)
    return body


async def _read_all(receive: Receive, limits: GatewayLimits, arriving: Arriving) -> bytes:
    parts = bytearray()
    counted = 0
    try:
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientDisconnected
            parts += message.get("body", b"")
            if len(parts) > limits.max_body_bytes:
                raise _too_large(len(parts), limits)
            if not message.get("more_body", False):
                return bytes(parts)
            counted = arriving.grow(counted, len(parts))
    finally:
        arriving.held_bytes -= counted


def _too_large(size: int, limits: GatewayLimits) -> PayloadTooLarge:
    return PayloadTooLarge(f"the body has {size} bytes or more, the limit is {limits.max_body_bytes}; send less")


def check_text(body: bytes, max_depth: int) -> None:
    """Refuses bytes that are not UTF-8, and JSON that is nested deeper than the limit."""
    if not body.isascii():
        try:
            body.decode()
        except UnicodeDecodeError as error:
            raise InvalidField(f"the body is not UTF-8 (byte {error.start})") from error
    if body.count(b"[") + body.count(b"{") <= max_depth:
        return
    brackets = _STRINGS.sub(b"", body).translate(_ONE_KIND, _NO_BRACKETS)
    # Each round removes the innermost level at C speed, so hostile nesting costs at most max_depth passes.
    for _ in range(max_depth):
        shorter = brackets.replace(b"[]", b"")
        if len(shorter) == len(brackets):
            break
        brackets = shorter
    if brackets:
        raise InvalidField(f"the body is nested deeper than {max_depth}, or its brackets do not match")
