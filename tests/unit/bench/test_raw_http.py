"""The load generator's client against a server that closes what it has kept."""

import asyncio
import contextlib
import itertools

from bench.load import Outcome
from bench.raw_http import RawClient
from bench.workload import Arrival

BODY = b'{"choices":[{"text":"a"}],"usage":{"completion_tokens":1,"prompt_tokens":2}}'
ANSWER = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(BODY), BODY)


async def answered(writes, requests):
    """Outcomes of requests one after the other; `writes` are what each connection does with its requests, in order.
    A request begins when the connection before the last one is closed."""
    connections, closed = itertools.count(), [asyncio.Event() for _ in writes]

    async def serve(reader, writer):
        number = next(connections)
        for piece in writes[number]:
            await reader.readuntil(b'"stream": false}')
            writer.write(piece)
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()
        closed[number].set()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        client = RawClient("127.0.0.1", server.sockets[0].getsockname()[1], "m", stream=False)
        outcomes = []
        for number in range(requests):
            if number > 0 and len(writes) > 1:
                await closed[number - 1].wait()
            outcomes.append(Outcome(0.0))
            await client.send([1, 2], Arrival(0, 2, 1), outcomes[-1])
        await client.close()
    return [(outcome.error, outcome.output_tokens) for outcome in outcomes]


async def test_a_kept_connection_that_was_closed_is_no_failed_request():
    assert await answered([[ANSWER], [ANSWER]], 2) == [(None, 1), (None, 1)]


async def test_an_answer_that_breaks_off_is_one():
    broken = ANSWER[:-10]
    [whole, (error, _)] = await answered([[ANSWER, broken]], 2)
    assert whole == (None, 1)
    assert "IncompleteReadError" in error


async def test_a_connection_that_is_closed_before_any_answer_is_one_when_it_was_new():
    [(error, _)] = await answered([[b""]], 1)
    assert "IncompleteReadError" in error
