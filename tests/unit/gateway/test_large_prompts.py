"""Large prompts are tokenized beside the event loop, one after the other, and only so many may wait."""

from __future__ import annotations

import asyncio
import functools
import threading
import tracemalloc
from collections.abc import Iterator, Sequence
from typing import Any

import openai
import pytest

from llmscale.gateway import services
from llmscale.gateway.answers import CompletionFormat
from llmscale.gateway.config import GatewayLimits
from llmscale.gateway.reply import Reply
from llmscale.tokenizer import Tokenizer
from tests.fakes.fake_front import FakeFront
from tests.fakes.gateway_server import serving, until

LARGE = "the quick brown fox jumps over the lazy dog " * 20_000


async def test_others_are_served_while_a_large_prompt_is_tokenized(tokenizer: Tokenizer) -> None:
    async with serving(tokenizer, max_sequence_tokens=1 << 20) as gateway:
        client = gateway.client()
        large = asyncio.ensure_future(client.completions.create(model="tiny", prompt=LARGE, max_tokens=1))
        served = 0
        while not large.done():
            await client.completions.create(model="tiny", prompt="x", max_tokens=1)
            served += 1
        answer = await large
    assert answer.usage is not None
    assert answer.usage.prompt_tokens > 100_000
    # Tokenizing takes some hundred milliseconds, a small request a few.
    assert served > 10


async def test_large_prompts_beyond_the_limit_are_refused_with_a_time_to_retry(tokenizer: Tokenizer) -> None:
    limits = GatewayLimits(max_waiting_large_prompts=2, max_drain_seconds=1)
    async with serving(tokenizer, limits=limits, max_sequence_tokens=1 << 20) as gateway:
        client = gateway.client()
        asking = [client.completions.create(model="tiny", prompt=LARGE, max_tokens=1) for _ in range(6)]
        results = await asyncio.gather(*asking, return_exceptions=True)
    refused = [result for result in results if isinstance(result, openai.RateLimitError)]
    assert len(refused) >= 1
    assert sum(not isinstance(result, Exception) for result in results) == 6 - len(refused)
    assert {error.response.headers["retry-after"] for error in refused} == {"1"}


async def test_a_burst_that_fits_the_queue_is_not_refused_for_its_tokenizing(tokenizer: Tokenizer) -> None:
    prompt = LARGE[:6_000]
    async with serving(tokenizer, max_sequence_tokens=1 << 20) as gateway:
        client = gateway.client()
        asking = [client.completions.create(model="tiny", prompt=prompt, max_tokens=1) for _ in range(200)]
        answers = await asyncio.gather(*asking)
    assert all(answer.choices[0].finish_reason == "length" for answer in answers)


async def test_texts_that_wait_take_a_bounded_memory(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(services, "MAX_WAITING_PROMPT_BYTES", 2 * len(LARGE))
    async with serving(tokenizer, max_sequence_tokens=1 << 20) as gateway:
        client = gateway.client()
        asking = [client.completions.create(model="tiny", prompt=LARGE, max_tokens=1) for _ in range(6)]
        results = await asyncio.gather(*asking, return_exceptions=True)
    refused = [result for result in results if isinstance(result, openai.RateLimitError)]
    assert 1 <= len(refused) <= 5
    assert all("wait to be tokenized, with these" in str(error) for error in refused)


async def test_a_prompt_that_is_too_long_is_refused_whether_or_not_it_is_tokenized(tokenizer: Tokenizer) -> None:
    async with serving(tokenizer) as gateway:
        for prompt in (LARGE, "x y " * 3_000):
            with pytest.raises(openai.BadRequestError) as refused:
                await gateway.client().completions.create(model="tiny", prompt=prompt, max_tokens=1)
            assert refused.value.code == "request_too_long"
            assert "This model's maximum context length is 4096 tokens (max_sequence_tokens" in refused.value.message


@pytest.fixture
def traced() -> Iterator[None]:
    tracemalloc.start()
    yield
    tracemalloc.stop()


LIVE: dict[str, tuple[str, str]] = {
    "padded completion": ("/v1/completions", '"prompt":"x"'),
    "padded chat": ("/v1/chat/completions", '"messages":[{"role":"user","content":"x"}]'),
    "many ids": ("/v1/completions", '"prompt":[' + "5," * 400_000 + "5]"),
}


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("stream", ["false", "true"])
@pytest.mark.parametrize("kind", LIVE)
async def test_live_requests_hold_neither_bodies_nor_prompts(tokenizer: Tokenizer, kind: str, stream: str) -> None:
    path, fields = LIVE[kind]
    body = f'{{"model":"tiny","stream":{stream},{fields}}}'.encode()
    body += b" " * ((4 << 20) - len(body))
    front = FakeFront(automatic=False, tokens=lambda _prompt, _sampling: iter([5]))
    async with serving(tokenizer, front, max_sequence_tokens=1 << 20) as gateway:
        head = (
            f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1:{gateway.port}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        ).encode()
        before = 0
        for live in range(1, 22):
            _, writer = await gateway.raw()
            writer.write(head)
            writer.write(body)
            await until(lambda wanted=live: len(front.live) == wanted)
            front.live[live].prompt.clear()
            if live == 1:
                # What the first request makes once, as a compiled template, is not counted.
                before = tracemalloc.get_traced_memory()[0]
        grown = tracemalloc.get_traced_memory()[0] - before
    assert grown < 20 << 20, f"20 live requests hold {grown} bytes"


@pytest.mark.parametrize("prompt", [LARGE[:500_000], [5] * 150_000])
async def test_echoes_of_more_than_an_answer_may_repeat_are_refused(tokenizer: Tokenizer, prompt: Any) -> None:
    async with serving(tokenizer, max_sequence_tokens=1 << 20) as gateway:
        # The client looks at each id of a prompt, but not at those of an extra body.
        create = functools.partial(gateway.client().completions.create, prompt="", extra_body={"prompt": prompt})
        with pytest.raises(openai.BadRequestError, match=r"in \d{8} bytes or more, the limit is 16777216") as refused:
            await create(model="tiny", echo=True, n=128, max_tokens=1)
        assert refused.value.param == "echo"
        assert gateway.front.submitted == {}
        answer = await create(model="tiny", echo=True, n=2, max_tokens=1)
    assert all(len(choice.text) >= 150_000 for choice in answer.choices)


async def test_large_echoes_are_decoded_and_written_beside_the_event_loop(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[str] = []
    decode, whole = Tokenizer.decode, CompletionFormat.whole

    def watched_decode(given: Tokenizer, ids: Sequence[int], **options: bool) -> str:
        threads.append(threading.current_thread().name)
        return decode(given, ids, **options)

    def watched_whole(form: CompletionFormat, reply: Reply) -> bytes:
        threads.append(threading.current_thread().name)
        return whole(form, reply)

    monkeypatch.setattr(Tokenizer, "decode", watched_decode)
    monkeypatch.setattr(CompletionFormat, "whole", watched_whole)
    async with serving(tokenizer, max_sequence_tokens=1 << 20) as gateway:
        create = gateway.client().completions.create
        ids = tokenizer.encode(LARGE[:600_000])
        answer = await create(model="tiny", prompt="", extra_body={"prompt": ids}, echo=True, n=4, max_tokens=1)
    assert [choice.text[:600_000] for choice in answer.choices] == [LARGE[:600_000]] * 4
    assert [name.partition("_")[0] for name in threads] == ["llmscale-prompts"] * 2
