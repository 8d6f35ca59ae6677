"""Reads a request's body within its limits, before anything looks at it.

Size, time, UTF-8 and nesting are checked in that order, each in time linear in the bytes received, and nothing beyond
the limit is kept. Knows nothing of what the body means.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterable
from typing import Final

from llmscale.errors import ArrivalTimeout, InvalidField, PayloadTooLarge, UnsupportedMediaType
from llmscale.gateway.asgi import Receive, Scope
from llmscale.gateway.config import GatewayLimits
from llmscale.gateway.connection import body_complete

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


async def read_body(scope: Scope, receive: Receive, limits: GatewayLimits) -> bytes:
    """The whole body, checked. Raises `PayloadTooLarge`, `ArrivalTimeout`, `UnsupportedMediaType` or `InvalidField`."""
    kind = header(scope, b"content-type")
    # Browsers send other types across origins without asking first, so this also keeps foreign pages out.
    if kind is None or kind.partition(b";")[0].strip().lower() != b"application/json":
        raise UnsupportedMediaType("the content type must be application/json")
    length = header(scope, b"content-length")
    if length is not None and length.isdigit() and int(length) > limits.max_body_bytes:
        raise _too_large(int(length), limits)
    if body_complete(scope):
        # Most bodies arrive with their header; they do not pay 5 us for a timer.
        body = await _read_all(receive, limits)
    else:
        try:
            async with asyncio.timeout(limits.max_body_seconds):
                body = await _read_all(receive, limits)
        except TimeoutError as error:
            raise ArrivalTimeout(f"the body did not arrive within {limits.max_body_seconds:g} s") from error
    check_text(body, limits.max_json_depth)
    return body


async def _read_all(receive: Receive, limits: GatewayLimits) -> bytes:
    parts = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnected
        parts += message.get("body", b"")
        if len(parts) > limits.max_body_bytes:
            raise _too_large(len(parts), limits)
        if not message.get("more_body", False):
            return bytes(parts)


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
