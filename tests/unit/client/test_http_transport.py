"""The client against peers that are no gateway, and against code of its own that fails."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from llmscale import AsyncClient, errors
from llmscale.client.calls import Call
from llmscale.client.http_format import HttpReply
from llmscale.client.http_transport import HttpAnswer
from llmscale.client.results import StreamChunk

Ask = Callable[[AsyncClient], Awaitable[object]]
CALL = Call("hi", None, None, None, "standard", None, streaming=True)


@pytest.mark.parametrize("ask", [AsyncClient.models, AsyncClient.health, lambda client: client.generate("hi")])
async def test_a_gateway_that_takes_the_connection_and_says_nothing_is_a_timeout(ask: Ask) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        async with AsyncClient(f"http://127.0.0.1:{silent.getsockname()[1]}", connect_timeout=0.2) as client:
            async with asyncio.timeout(20):
                with pytest.raises(errors.ClientTimeout, match=r"did not answer within 0\.2 s"):
                    await ask(client)


async def test_an_error_that_nobody_thought_of_ends_an_answer_after_what_came_before_it() -> None:
    async def read(_: HttpReply) -> AsyncIterator[list[StreamChunk]]:
        yield [StreamChunk("request-1", 0, "Hel")]
        raise ValueError("not a number")

    answer = HttpAnswer(HttpReply(CALL), read)
    async with asyncio.timeout(20):
        assert [chunk.text for chunk in await answer.next()] == ["Hel"]
        for _ in range(2):
            with pytest.raises(errors.TransportError, match="ValueError: not a number") as raised:
                await answer.next()
    assert isinstance(raised.value.__cause__, ValueError)
