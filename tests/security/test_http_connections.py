"""Hostile bytes on the gateway's socket: floods, slow clients, smuggling. It answers, closes and goes on."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import socket

import psutil
import pytest

from llmscale.gateway.config import GatewayLimits
from llmscale.tokenizer import Tokenizer
from tests.fakes.fake_front import FakeFront
from tests.fakes.gateway_server import Serving, serving, until
from tests.fakes.raw_http import BODY, HEADER, code, post, status


async def dripped(gateway: Serving, head: bytes, drop: bytes, *, drops: int) -> bytes:
    """The answer to a client that goes on sending. A drop that meets a closed socket resets the connection, and may
    take the answer with it: then another client tries."""
    for _ in range(5):
        reader, writer = await gateway.raw()
        writer.write(head)
        received = asyncio.ensure_future(reader.read())
        with contextlib.suppress(ConnectionError):
            for _ in range(drops):
                if received.done():
                    return received.result()
                writer.write(drop)
                await asyncio.wait({received}, timeout=0.05)
            raise AssertionError(f"it is still open after {drops} drops and {0.05 * drops:g} seconds")
    raise AssertionError("five connections were reset")


async def test_a_header_that_never_ends_is_closed_in_time(gateway: Serving) -> None:
    answer = await dripped(gateway, b"GET /v1/models HTTP/1.1\r\n", b"X-Slow: 1\r\n", drops=95)
    assert (status(answer), code(answer)) == (408, "arrival_timeout")


async def test_a_connection_that_says_nothing_is_closed_in_time(gateway: Serving) -> None:
    assert status(await gateway.exchange(b"")) == 408


async def test_line_ends_alone_do_not_keep_a_connection_open(gateway: Serving) -> None:
    reader, writer = await gateway.raw()
    writer.write(post(BODY, extra=b""))
    async with asyncio.timeout(60):
        await reader.readuntil(b"}}")
        with contextlib.suppress(ConnectionError):
            while not reader.at_eof():
                writer.write(b"\r\n")
                await writer.drain()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(0.1):
                        await reader.read(1_000)


async def test_an_idle_connection_is_closed_after_its_time(gateway: Serving) -> None:
    answer = await gateway.exchange(post(BODY, extra=b""))
    assert status(answer) == 200


async def slow_clients(gateway: Serving) -> list[asyncio.StreamReader]:
    """A hundred, which have sent less than a header: what they will read."""
    clients = [await gateway.raw() for _ in range(100)]
    for _, writer in clients:
        writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: loc")
    return [reader for reader, _ in clients]


async def test_a_hundred_slow_clients_do_not_delay_an_honest_one(patient: Serving) -> None:
    await slow_clients(patient)
    assert status(await patient.exchange(post(BODY))) == 200
    # It has not waited for them: they are still being waited for.
    assert len(patient.server.server_state.connections) >= 100


async def test_a_hundred_slow_clients_are_closed_in_time(gateway: Serving) -> None:
    slow = await slow_clients(gateway)
    async with asyncio.timeout(60):
        assert {status(await reader.read()) for reader in slow} == {408}


async def test_a_body_that_drips_is_a_408_and_closes(gateway: Serving) -> None:
    answer = await dripped(gateway, post(b"x" * 100)[:-100], b"{", drops=95)
    assert (status(answer), code(answer)) == (408, "arrival_timeout")


@pytest.mark.parametrize(
    "head",
    [
        b"X-Long: " + b"a" * 40_000 + b"\r\n",
        b"X: y\r\n" * 101,
        b"".join(b"X-%d: %b\r\n" % (n, b"a" * 500) for n in range(80)),
    ],
    ids=["one long field", "many fields", "together"],
)
@pytest.mark.parametrize("parts", [1, 50])
async def test_a_header_beyond_its_limit_is_a_431(patient: Serving, head: bytes, parts: int) -> None:
    data = b"GET /v1/models HTTP/1.1\r\n" + HEADER + head + b"\r\n"
    reader, writer = await patient.raw()
    received = asyncio.ensure_future(reader.read())
    step = -(-len(data) // parts)
    with contextlib.suppress(ConnectionError):
        for start in range(0, len(data), step):
            writer.write(data[start : start + step])
            await writer.drain()
            await asyncio.sleep(0)
    with contextlib.suppress(ConnectionError):
        answer = await asyncio.wait_for(received, 60)
        assert (status(answer), code(answer)) == (431, "header_too_large")


async def test_a_header_below_its_limit_is_read(patient: Serving) -> None:
    data = b"GET /v1/models HTTP/1.1\r\n" + HEADER + b"X-Long: " + b"a" * 32_000 + b"\r\nConnection: close\r\n\r\n"
    assert status(await patient.exchange(data)) == 200


async def test_a_long_path_is_a_431(patient: Serving) -> None:
    data = b"GET /" + b"a" * 40_000 + b" HTTP/1.1\r\n" + HEADER + b"\r\n"
    assert status(await patient.exchange(data)) == 431


# What Java's client sends with every first request, and a browser to a page's socket.
UPGRADES = {
    "h2c": b"Connection: Upgrade, HTTP2-Settings\r\nHTTP2-Settings: AAEAAEAAAAIAAAAB\r\nUpgrade: h2c\r\n",
    "websocket": b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: x\r\nSec-WebSocket-Version: 13\r\n",
}
SMUGGLED = b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n"
AMBIGUOUS = {
    "length and chunked": b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + SMUGGLED,
    "chunked and length": b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n" + SMUGGLED,
    "two lengths": b"Content-Length: 0\r\nContent-Length: 44\r\n\r\n" + SMUGGLED,
    "two lengths in one": b"Content-Length: 0, 44\r\n\r\n" + SMUGGLED,
    "chunked twice": b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n0\r\n\r\n" + SMUGGLED,
    "chunked not last": b"Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n" + SMUGGLED,
    "unknown encoding": b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n" + SMUGGLED,
    "space before the colon": b"Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n" + SMUGGLED,
    "folded field": b"X: y\r\n Transfer-Encoding: chunked\r\n\r\n" + SMUGGLED,
    "bare line feeds": b"X: y\nContent-Length: 44\n\n" + SMUGGLED,
    "null in a value": b"X: a\0b\r\n\r\n" + SMUGGLED,
    "bare carriage return": b"X: a\rContent-Length: 44\r\n\r\n" + SMUGGLED,
    "negative length": b"Content-Length: -1\r\n\r\n" + SMUGGLED,
    "signed length": b"Content-Length: +5\r\n\r\n" + SMUGGLED,
    "hexadecimal length": b"Content-Length: 0x5\r\n\r\n" + SMUGGLED,
    "huge length": b"Content-Length: 99999999999999999999999\r\n\r\n" + SMUGGLED,
    "chunk size overflow": b"Transfer-Encoding: chunked\r\n\r\nffffffffffffffffff\r\n" + SMUGGLED,
    "chunk size sign": b"Transfer-Encoding: chunked\r\n\r\n-1\r\n" + SMUGGLED,
    "chunk end missing": b"Transfer-Encoding: chunked\r\n\r\n1\r\nab\r\n0\r\n\r\n" + SMUGGLED,
}


@pytest.mark.parametrize("upgrade", [b"", UPGRADES["h2c"]], ids=["", "upgrade"])
@pytest.mark.parametrize("name", AMBIGUOUS)
async def test_a_request_that_two_parsers_could_read_differently_smuggles_nothing(
    gateway: Serving, name: str, upgrade: bytes
) -> None:
    head = b"POST /v1/completions HTTP/1.1\r\nContent-Type: application/json\r\n" + HEADER + upgrade
    answer = await gateway.exchange(head + AMBIGUOUS[name])
    assert b"llmscale:prompt_tokens" not in answer
    assert answer.count(b"HTTP/1.1 4") <= 1
    assert status(answer) in {0, 400, 408, 413}


NOT_HTTP = [
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + os.urandom(64),
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"\x80\x04\x95" + b"c__builtin__\neval\n(S'1'\ntR." * 3,
    b"GET / HTTP/9.9\r\n\r\n",
    b"GET / extra HTTP/1.1\r\n\r\n",
    b"G\xffT / HTTP/1.1\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: a\r\nBad Header\r\n\r\n",
    b"\r\n" * 1_000 + b"\0",
    b"A" * 100_000,
]


@pytest.mark.parametrize("data", NOT_HTTP, ids=range(len(NOT_HTTP)))
async def test_bytes_that_are_not_http_are_refused_and_closed(gateway: Serving, data: bytes) -> None:
    assert status(await gateway.exchange(data)) in {0, 400, 431}


async def answers(gateway: Serving, requests: list[bytes], packets: str) -> bytes:
    """What several requests on one connection get, of which the last one closes it."""
    data = b"".join(requests)
    cuts = {
        "one packet": [],
        "header and body": [data.index(b"\r\n\r\n") + 4],
        "byte by byte": range(1, len(data)),
    }[packets]
    reader, writer = await gateway.raw()
    received = asyncio.ensure_future(reader.read())
    for start, end in itertools.pairwise([0, *cuts, len(data)]):
        writer.write(data[start:end])
        await asyncio.sleep(0.002)
    return await asyncio.wait_for(received, 60)


PACKETS = pytest.mark.parametrize("packets", ["one packet", "header and body", "byte by byte"])
UPGRADE = pytest.mark.parametrize("upgrade", UPGRADES.values(), ids=UPGRADES)
CHUNKED = b"Transfer-Encoding: chunked\r\n\r\n5\r\n%b\r\n%x\r\n%b\r\n0\r\nX-Trailer: y\r\n\r\n"


@PACKETS
@UPGRADE
@pytest.mark.parametrize("chunked", [False, True], ids=["length", "chunked"])
async def test_a_request_that_asks_for_another_protocol_keeps_its_body(
    patient: Serving, upgrade: bytes, packets: str, chunked: bool
) -> None:
    first = post(BODY, extra=upgrade)
    if chunked:
        first = first.replace(b"Content-Length: %d\r\n" % len(BODY), b"").removesuffix(b"\r\n" + BODY)
        first += CHUNKED % (BODY[:5], len(BODY) - 5, BODY[5:])
    answer = await answers(patient, [first, post(BODY)], packets)
    assert (answer.count(b"HTTP/1.1 "), answer.count(b"HTTP/1.1 200 ")) == (2, 2)


@PACKETS
@UPGRADE
@pytest.mark.parametrize("method", [b"GET /v1/models", b"POST /v1/completions", b"CONNECT a://b/v1/models"])
async def test_the_body_of_a_request_that_asks_for_another_protocol_is_no_request(
    patient: Serving, upgrade: bytes, packets: str, method: bytes
) -> None:
    first = post(SMUGGLED, extra=upgrade).replace(b"POST /v1/completions", method)
    answer = await answers(patient, [first, post(BODY, extra=b"X-Request-Id: next\r\nConnection: close\r\n")], packets)
    assert b"llmscale:prompt_tokens" not in answer
    assert answer.count(b"HTTP/1.1 ") == 2
    assert status(answer) == {b"G": 200, b"P": 400, b"C": 405}[method[:1]]
    assert b"x-request-id: next" in answer


@UPGRADE
async def test_an_upgrade_is_not_followed(gateway: Serving, upgrade: bytes) -> None:
    answer = await gateway.exchange(b"GET /v1/models HTTP/1.1\r\n" + HEADER + upgrade + b"\r\n")
    assert status(answer) == 200
    last = upgrade.replace(b"Connection: ", b"Connection: close, ")
    answer = await gateway.exchange(post(BODY, extra=last) + b"what follows the last request is not read")
    assert (status(answer), answer.count(b"HTTP/1.1 ")) == (200, 1)
    connect = await gateway.exchange(b"CONNECT example.org:443 HTTP/1.1\r\nHost: example.org\r\n\r\n")
    assert status(connect) in {0, 400, 404, 405}


async def test_a_flood_of_tiny_chunks_is_bounded_in_memory_and_ends_at_the_limit(gateway: Serving) -> None:
    head = b"POST /v1/completions HTTP/1.1\r\nContent-Type: application/json\r\n" + HEADER
    reader, writer = await gateway.raw()
    writer.write(head + b"Transfer-Encoding: chunked\r\n\r\n")
    received = asyncio.ensure_future(reader.read())
    process = psutil.Process()
    before = process.memory_info().rss
    with contextlib.suppress(ConnectionError):
        for _ in range(2_000):
            if received.done():
                break
            writer.write(b"1\r\n[\r\n" * 5_000)
            await writer.drain()
    with contextlib.suppress(ConnectionError):
        answer = await asyncio.wait_for(received, 60)
        assert status(answer) in {0, 408, 413}
    assert process.memory_info().rss - before < 32 << 20


async def test_a_hundred_megabytes_of_body_are_not_kept(patient: Serving) -> None:
    reader, writer = await patient.raw()
    received = asyncio.ensure_future(reader.read())
    process = psutil.Process()
    before = process.memory_info().rss
    writer.write(b"POST /v1/completions HTTP/1.1\r\nContent-Type: application/json\r\n" + HEADER)
    writer.write(b"Transfer-Encoding: chunked\r\n\r\n")
    chunk = b"100000\r\n" + b" " * 0x100000 + b"\r\n"
    sent = 0
    with contextlib.suppress(ConnectionError):
        for _ in range(100):
            if received.done():
                break
            writer.write(chunk)
            await writer.drain()
            sent += 1
    with contextlib.suppress(ConnectionError):
        answer = await asyncio.wait_for(received, 60)
        assert (status(answer), code(answer)) == (413, "payload_too_large")
    assert sent < 100
    assert process.memory_info().rss - before < 32 << 20


async def test_a_declared_body_beyond_the_limit_is_refused_at_once(patient: Serving) -> None:
    head = post(b"", extra=b"").replace(b"Content-Length: 0", b"Content-Length: 104857600")
    answer = await patient.exchange(head)
    assert (status(answer), code(answer)) == (413, "payload_too_large")


async def test_a_client_that_waits_to_send_its_body_is_told_first(patient: Serving) -> None:
    reader, writer = await patient.raw()
    data = post(BODY, extra=b"Expect: 100-continue\r\nConnection: close\r\n")
    writer.write(data[: -len(BODY)])
    assert b"100 Continue" in await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 60)
    writer.write(BODY)
    assert status(await asyncio.wait_for(reader.read(), 60)) == 200


async def test_pipelined_requests_are_answered_in_order(gateway: Serving) -> None:
    answer = await gateway.exchange(
        post(BODY, extra=b"X-Request-Id: one\r\n") + post(BODY, extra=b"X-Request-Id: two\r\n")
    )
    assert answer.count(b"200 OK") == 2
    assert answer.index(b"x-request-id: one") < answer.index(b"x-request-id: two")


async def test_connections_beyond_the_limit_are_refused(tokenizer: Tokenizer) -> None:
    async with serving(tokenizer, limits=GatewayLimits(max_connections=5, max_drain_seconds=1)) as gateway:
        kept = [await gateway.raw() for _ in range(5)]
        await until(lambda: len(gateway.server.server_state.connections) == 5)
        answer = await gateway.exchange(b"")
        assert (status(answer), code(answer)) == (503, "unavailable")
        assert len(gateway.server.server_state.connections) == 5
        for _, writer in kept:
            writer.close()
        await until(lambda: not gateway.server.server_state.connections)
        assert status(await gateway.exchange(post(BODY))) == 200


@pytest.mark.parametrize(
    ("given", "echoed"),
    [
        (b"abc-1.2_3", True),
        (b"x" * 64, True),
        (b"x" * 65, False),
        (b"a b", False),
        (b"<script>", False),
        (b"\xff", False),
    ],
)
async def test_a_request_id_is_repeated_only_if_it_is_short_and_plain(
    patient: Serving, given: bytes, echoed: bool
) -> None:
    answer = await patient.exchange(post(BODY, extra=b"X-Request-Id: " + given + b"\r\nConnection: close\r\n"))
    assert (b"x-request-id: " + given + b"\r\n" in answer) == echoed
    assert b"x-request-id: " in answer


@pytest.mark.parametrize("close", [b"", b"Connection: close\r\n"])
async def test_a_client_that_never_reads_a_large_answer_is_dropped(tokenizer: Tokenizer, close: bytes) -> None:
    limits = GatewayLimits(max_stall_seconds=1, max_idle_connection_seconds=1, max_drain_seconds=1)
    front = FakeFront(automatic=False)
    async with serving(tokenizer, front, limits=limits, max_sequence_tokens=1 << 20) as gateway:
        body = b'{"model":"tiny","prompt":"x","max_tokens":10000,"logprobs":20,"n":4,"ignore_eos":true}'
        unread = socket.socket()
        unread.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
        unread.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(unread, ("127.0.0.1", gateway.port))
        await loop.sock_sendall(unread, post(body, extra=close))
        await until(lambda: len(front.live) == 4)
        front.step(tokens=10_000)
        await until(lambda: not front.live)
        await until(lambda: not gateway.server.server_state.connections)
        unread.close()


async def test_a_client_that_reads_a_large_answer_slowly_gets_all_of_it(tokenizer: Tokenizer) -> None:
    limits = GatewayLimits(max_stall_seconds=1, max_drain_seconds=1)
    async with serving(tokenizer, FakeFront(automatic=False), limits=limits, max_sequence_tokens=1 << 20) as gateway:
        body = b'{"model":"tiny","prompt":"x","max_tokens":10000,"logprobs":20,"ignore_eos":true}'
        reader, writer = await gateway.raw()
        writer.write(post(body))
        await until(lambda: gateway.front.live)
        gateway.front.step(tokens=10_000)
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
        received = b""
        while len(received) < length:
            received += await asyncio.wait_for(reader.read(1 << 16), 60)
            await asyncio.sleep(0.01)
        assert json.loads(received)["usage"]["completion_tokens"] == 10_000
