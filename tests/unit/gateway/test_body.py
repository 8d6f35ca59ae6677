"""Bodies are read within limits of size, time, encoding and nesting."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmscale.errors import ArrivalTimeout, InvalidField, Overloaded, PayloadTooLarge, UnsupportedMediaType
from llmscale.gateway import body as bodies
from llmscale.gateway.asgi import Message
from llmscale.gateway.body import Arriving, ClientDisconnected, check_text, read_body
from llmscale.gateway.config import GatewayLimits

LIMITS = GatewayLimits(max_body_bytes=1_000, max_body_seconds=0.05, max_json_depth=8)
JSON = [(b"content-type", b"application/json; charset=utf-8")]


def receiving(*parts: bytes, end: bool = True) -> Any:
    """An ASGI `receive` that gives these parts, and then waits forever or disconnects."""
    messages: list[Message] = [{"type": "http.request", "body": part, "more_body": True} for part in parts]
    if end:
        messages[-1]["more_body"] = False

    async def receive() -> Message:
        if messages:
            return messages.pop(0)
        await asyncio.Event().wait()
        raise AssertionError

    return receive


async def test_parts_are_joined() -> None:
    assert await read_body({"headers": JSON}, receiving(b'{"a"', b":1}"), LIMITS, Arriving()) == b'{"a":1}'


async def test_a_declared_length_beyond_the_limit_is_refused_without_reading() -> None:
    scope = {"headers": [*JSON, (b"content-length", b"1001")]}
    with pytest.raises(PayloadTooLarge, match="1001 bytes"):
        await read_body(scope, receiving(b"", end=False), LIMITS, Arriving())


async def test_a_body_without_a_length_is_cut_off_at_the_limit() -> None:
    received = 0

    async def endless() -> Message:
        nonlocal received
        received += 400
        return {"type": "http.request", "body": b"x" * 400, "more_body": True}

    with pytest.raises(PayloadTooLarge):
        await read_body({"headers": JSON}, endless, LIMITS, Arriving())
    assert received == 1_200


async def test_a_body_of_exactly_the_limit_is_read() -> None:
    body = b'"' + b"x" * 998 + b'"'
    assert await read_body({"headers": JSON}, receiving(body), LIMITS, Arriving()) == body


async def test_a_body_that_does_not_end_in_time_is_a_408() -> None:
    with pytest.raises(ArrivalTimeout, match=r"0\.05 s"):
        await read_body({"headers": JSON}, receiving(b"{", end=False), LIMITS, Arriving())


async def test_a_client_that_leaves_is_not_an_error_of_its_request() -> None:
    async def receive() -> Message:
        return {"type": "http.disconnect"}

    with pytest.raises(ClientDisconnected):
        await read_body({"headers": JSON}, receive, LIMITS, Arriving())


async def test_bodies_that_arrive_share_a_bound_and_small_ones_pass_beside_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bodies, "MAX_ARRIVING_BYTES", 1 << 20)
    limits = GatewayLimits(max_body_seconds=60)
    arriving = Arriving()
    large = [b"x" * (400 << 10), b'"']
    held = [
        asyncio.ensure_future(read_body({"headers": JSON}, receiving(b'"', part, end=False), limits, arriving))
        for part in [large[0]] * 3
    ]
    await asyncio.sleep(0)
    assert not any(task.done() for task in held)
    with pytest.raises(Overloaded, match="bodies of 1032195 bytes are arriving") as refused:
        await read_body({"headers": JSON}, receiving(b'"', *large), limits, arriving)
    assert refused.value.http_status == 429
    small = await read_body({"headers": JSON}, receiving(b'"', b"x" * (60 << 10), b'"'), limits, arriving)
    assert len(small) == (60 << 10) + 2
    held[0].cancel()
    await asyncio.wait(held[:1])
    assert len(await read_body({"headers": JSON}, receiving(b'"', *large), limits, arriving)) == (400 << 10) + 2
    for task in held:
        task.cancel()
    await asyncio.wait(held)
    assert arriving.held_bytes == 0


async def test_a_body_alone_is_bounded_by_its_own_limit_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "MAX_ARRIVING_BYTES", 100 << 10)
    parts = [b'"', *[b"x" * (100 << 10)] * 3, b'"']
    assert len(await read_body({"headers": JSON}, receiving(*parts), GatewayLimits(), Arriving())) == (300 << 10) + 2


@pytest.mark.parametrize("kind", [None, b"text/plain", b"application/x-www-form-urlencoded", b"application/jsonp"])
async def test_only_json_is_read(kind: bytes | None) -> None:
    headers = [] if kind is None else [(b"content-type", kind)]
    with pytest.raises(UnsupportedMediaType):
        await read_body({"headers": headers}, receiving(b"{}"), LIMITS, Arriving())


NESTED = st.recursive(st.none() | st.text(alphabet='"\\[]{}ab', max_size=6), lambda inner: st.lists(inner, max_size=3))


def depth_of(value: object) -> int:
    if isinstance(value, list):
        return 1 + max(map(depth_of, value), default=0)
    if isinstance(value, dict):
        return 1 + max(map(depth_of, value.values()), default=0)
    return 0


@given(NESTED, st.integers(1, 6))
def test_nesting_is_measured_as_a_parser_would(value: object, limit: int) -> None:
    body = json.dumps(value).encode()
    if depth_of(value) > limit:
        with pytest.raises(InvalidField, match="nested deeper"):
            check_text(body, limit)
    else:
        check_text(body, limit)


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 65 + b"]" * 65,
        b"[" * 2_000_000,
        b"]" * 100 + b"[" * 100,
        b'{"a":' * 100_000,
        b"[{" * 1_000_000,
        b'["' + b'\\"[' * 100 + b'"' + b"[" * 100,
    ],
)
def test_deep_or_unbalanced_brackets_are_refused_in_milliseconds(body: bytes) -> None:
    started = time.thread_time()
    with pytest.raises(InvalidField, match="nested deeper"):
        check_text(body, 64)
    assert time.thread_time() - started < 0.5


def test_many_shallow_lists_are_not_deep() -> None:
    started = time.thread_time()
    check_text(b"[" + b"[]," * 1_300_000 + b"[]]", 64)
    check_text(json.dumps({"text": "[" * 1_000_000 + '"\\'}).encode(), 64)
    assert time.thread_time() - started < 0.5


def test_bytes_that_are_not_utf8_are_refused_wherever_they_are() -> None:
    with pytest.raises(InvalidField, match="not UTF-8"):
        check_text(b'{"unknown":"\xff"}', 64)
