"""The client against peers that are no gateway, and against code of its own that fails."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from llmscale import errors
from llmscale.client.calls import Call
from llmscale.client.http_format import HttpReply
from llmscale.client.http_transport import HttpAnswer
from llmscale.client.results import StreamChunk

CALL = Call("hi", None, None, None, "standard", None, streaming=True)


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
