"""What unsent answers hold has one bound for all requests of a gateway."""

from __future__ import annotations

import asyncio
import json
import socket
from typing import Any

import openai
import pytest

from llmscale.errors import Overloaded
from llmscale.gateway import driver
from llmscale.tokenizer import Tokenizer
from tests.fakes.fake_front import FakeFront
from tests.fakes.gateway_server import Serving, serving, until


def scripted() -> FakeFront:
    return FakeFront(automatic=False, tokens=lambda _prompt, _sampling: iter([5] * 1_000))


def asked(gateway: Serving, **fields: Any) -> asyncio.Task[Any]:
    create: Any = gateway.client().completions.create
    return asyncio.ensure_future(create(**{"model": "tiny", "prompt": "x", **fields}))


async def test_of_unsent_answers_with_too_many_log_probabilities_the_largest_ends(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver, "MAX_HELD_BYTES", 100 * 22 * 112 + 100 * 7 * 112)
    front = scripted()
    async with serving(tokenizer, front) as gateway:
        large = asked(gateway, logprobs=20, max_tokens=500)
        await until(lambda: len(front.live) == 1)
        small = [asked(gateway, logprobs=5, max_tokens=110), asked(gateway, max_tokens=110)]
        await until(lambda: len(front.live) == 3)
        front.step(100)
        await until(lambda: gateway.gateway.services.driver.held_bytes > 0)
        assert not large.done()
        front.step(10)
        answers = await asyncio.gather(*small)
        with pytest.raises(openai.RateLimitError, match="this one held the most, 2") as refused:
            await large
        assert front.cancelled.keys() == {1}
        await until(lambda: gateway.gateway.services.driver.held_bytes == 0)
    assert refused.value.code == Overloaded.code
    assert [answer.choices[0].finish_reason for answer in answers] == ["length"] * 2
    assert len(answers[0].choices[0].logprobs.tokens) == 110


async def test_log_probabilities_of_streams_have_a_bound_of_their_own(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver, "MAX_HELD_BYTES", 1)
    async with serving(tokenizer) as gateway:
        chunks = await asked(gateway, logprobs=20, max_tokens=100, stream=True)
        [chunk async for chunk in chunks]
        assert gateway.gateway.services.driver.held_bytes == 0


@pytest.mark.parametrize("stream", [False, True])
async def test_echoes_of_live_requests_are_bounded_together(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    monkeypatch.setattr(driver, "MAX_HELD_BYTES", 2_500)
    front = scripted()
    async with serving(tokenizer, front) as gateway:
        live = [asked(gateway, prompt="x" * 1_000, echo=True, n=2, max_tokens=1, stream=stream) for _ in range(2)]
        await until(lambda: len(front.live) == 4)
        with pytest.raises(openai.RateLimitError, match="leave echo out"):
            await asked(gateway, prompt="x" * 1_000, echo=True, max_tokens=1, stream=stream)
        plain = asked(gateway, prompt="x" * 1_000, max_tokens=1)
        await until(lambda: len(front.live) == 5)
        front.step()
        assert (await plain).choices[0].finish_reason == "length"
        await asyncio.gather(*live)
        await until(lambda: gateway.gateway.services.driver.held_bytes == 0)


async def test_an_answer_counts_until_its_client_has_read_it(tokenizer: Tokenizer) -> None:
    text = "the quick brown fox " * 50_000
    body = json.dumps({"model": "tiny", "prompt": text, "echo": True, "n": 14, "max_tokens": 1}).encode()
    async with serving(tokenizer, max_sequence_tokens=1 << 20) as gateway:
        held = gateway.gateway.services.driver
        reader, writer = await gateway.raw()
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 18)
        head = f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{gateway.port}\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        answer_head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        await asyncio.sleep(0.1)
        assert held.held_bytes > len(text)
        length = int(answer_head.partition("content-length: ")[2].split()[0])
        answer = json.loads(await reader.readexactly(length))
        await until(lambda: held.held_bytes == 0)
    assert all(choice["text"].startswith(text) for choice in answer["choices"])
    assert len(answer["choices"]) == 14
