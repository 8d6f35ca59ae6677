"""OpenAI's own client works unchanged against the gateway."""

from __future__ import annotations

import asyncio
from typing import Any

import openai
import pytest

from llmscale.errors import Overloaded, Unavailable
from llmscale.tokenizer import Tokenizer
from tests.fakes.fake_front import FakeFront
from tests.fakes.gateway_server import serving

QUESTION = [{"role": "user", "content": "hello world"}]


def scripted(tokenizer: Tokenizer, text: str, *, end: bool = True) -> FakeFront:
    """A front whose every answer is this text."""
    ids = tokenizer.encode(text) + ([2] if end else [])
    return FakeFront(tokens=lambda _prompt, _sampling: iter(ids))


async def test_a_completion_has_the_models_text_and_its_usage(tokenizer: Tokenizer) -> None:
    async with serving(tokenizer, scripted(tokenizer, " fine, thank you.")) as gateway:
        answer = await gateway.client().completions.create(model="tiny", prompt="how are you?", max_tokens=50)
    assert answer.choices[0].text == " fine, thank you."
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(tokenizer.encode("how are you?"))
    assert answer.usage.completion_tokens == len(tokenizer.encode(" fine, thank you.")) + 1


async def test_a_chat_answer_ends_with_length_at_max_tokens(tokenizer: Tokenizer) -> None:
    async with serving(tokenizer, scripted(tokenizer, "one two three four")) as gateway:
        answer = await gateway.client().chat.completions.create(
            model="tiny", messages=QUESTION, max_completion_tokens=2
        )
        sampling = gateway.front.submitted[1].sampling
    assert answer.choices[0].finish_reason == "length"
    assert answer.choices[0].message.role == "assistant"
    assert sampling.max_tokens == 2


async def test_a_chat_stream_adds_up_to_the_whole_answer_and_names_the_role_once(tokenizer: Tokenizer) -> None:
    async with serving(tokenizer, scripted(tokenizer, "I am fine, thank you. né 😀")) as gateway:
        stream = await gateway.client().chat.completions.create(
            model="tiny", messages=QUESTION, stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == "I am fine, thank you. né 😀"
    assert [chunk.choices[0].delta.role for chunk in chunks if chunk.choices].count("assistant") == 1
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "stop"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == len(tokenizer.encode("I am fine, thank you. né 😀")) + 1


async def test_a_completion_stream_adds_up_to_the_whole_answer(tokenizer: Tokenizer) -> None:
    async with serving(tokenizer, scripted(tokenizer, "the lazy dog")) as gateway:
        stream = await gateway.client().completions.create(model="tiny", prompt="x", stream=True, max_tokens=50)
        chunks = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].text for chunk in chunks) == "the lazy dog"


@pytest.mark.parametrize("last", [{}, {"include_usage": True}], ids=["", "last event"])
@pytest.mark.parametrize("chat", [False, True])
async def test_every_event_says_the_usage_so_far_where_it_is_asked_to(
    tokenizer: Tokenizer, chat: bool, last: dict[str, bool]
) -> None:
    async with serving(tokenizer, scripted(tokenizer, "the lazy dog, né 😀")) as gateway:
        client = gateway.client()
        create: Any = client.chat.completions.create if chat else client.completions.create
        asked = {"messages": QUESTION} if chat else {"prompt": "hello world"}
        options = {"continuous_usage_stats": True, **last}
        stream = await create(model="tiny", **asked, n=2, max_tokens=50, stream=True, stream_options=options)
        chunks = [chunk async for chunk in stream]
        [prompt] = {len(one.prompt) for one in gateway.front.submitted.values()}
    tokens = 2 * (len(tokenizer.encode("the lazy dog, né 😀")) + 1)
    spent = [chunk.usage.completion_tokens for chunk in chunks]
    assert spent == sorted(spent)
    assert 0 < spent[0] < spent[-1] == tokens
    assert {chunk.usage.prompt_tokens for chunk in chunks} == {prompt}
    assert {chunk.usage.total_tokens - chunk.usage.completion_tokens for chunk in chunks} == {prompt}
    assert [bool(chunk.choices) for chunk in chunks] == [True] * (len(chunks) - len(last)) + [False] * len(last)


@pytest.mark.parametrize("value", [False, None])
async def test_without_the_usage_so_far_only_the_last_event_says_it(tokenizer: Tokenizer, value: bool | None) -> None:
    async with serving(tokenizer, scripted(tokenizer, "the lazy dog")) as gateway:
        options: Any = {"include_usage": True, "include_obfuscation": None, "continuous_usage_stats": value}
        stream = await gateway.client().completions.create(
            model="tiny", prompt="x", stream=True, stream_options=options
        )
        *others, last = [chunk async for chunk in stream]
    assert {chunk.usage for chunk in others} == {None}
    assert last.usage is not None


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("asked", "likelier"), [(0, 0), (2, 1), (2, 5)], ids=["none", "one of them", "none of them"])
async def test_the_drawn_token_is_always_among_the_likeliest_of_a_completion(
    tokenizer: Tokenizer, asked: int, likelier: int, stream: bool
) -> None:
    ids = tokenizer.encode("fox")
    front = FakeFront(tokens=lambda _prompt, _sampling: iter(ids), likelier=likelier)
    async with serving(tokenizer, front) as gateway:
        create: Any = gateway.client().completions.create
        answer = await create(model="tiny", prompt="x", logprobs=asked, max_tokens=len(ids), stream=stream)
        answers = [chunk async for chunk in answer] if stream else [answer]
    found = [answer.choices[0].logprobs for answer in answers]
    drawn = [tokenizer.token_bytes(token).decode() for token in ids]
    assert [token for rows in found for token in rows.tokens] == drawn
    tops = [top for rows in found for top in rows.top_logprobs]
    for token, name, top in zip(ids, drawn, tops, strict=True):
        ranked = [tokenizer.token_bytes(token - likelier + rank).decode() for rank in range(asked)]
        expected = ranked if name in ranked else [*ranked, name]
        assert list(top) == expected
        assert top[name] == -0.25 - likelier
        assert list(top.values()) == sorted(top.values(), reverse=True)


async def test_the_models_are_listed_with_their_longest_sequence(tokenizer: Tokenizer) -> None:
    async with serving(tokenizer) as gateway:
        listed = await gateway.client().models.list()
        one = await gateway.client().models.retrieve("tiny")
        with pytest.raises(openai.NotFoundError) as missing:
            await gateway.client().models.retrieve("other/model")
    assert [model.id for model in listed.data] == ["tiny"]
    assert one.model_extra == {"root": "tiny", "parent": None, "max_model_len": 4096}
    assert missing.value.code == "unknown_model"


@pytest.mark.parametrize(
    ("fields", "most"),
    [({"n": 9}, (1 << 20) // 9), ({"logprobs": True, "top_logprobs": 8}, (1 << 20) // 9), ({}, None)],
)
async def test_an_answer_that_nobody_bounded_is_as_long_as_the_bounds_leave_it(
    tokenizer: Tokenizer, fields: dict[str, Any], most: int | None
) -> None:
    async with serving(tokenizer, scripted(tokenizer, "hi"), max_sequence_tokens=131_072) as gateway:
        message = {"role": "user", "content": "hi"}
        create: Any = gateway.client().chat.completions.create
        await create(model="tiny", messages=[message], **fields)
        sent = list(gateway.front.submitted.values())
    room = 131_072 - len(sent[0].prompt)
    assert [one.sampling.max_tokens for one in sent] == [room if most is None else most] * len(sent)


async def test_a_full_queue_is_a_429_with_the_seconds_until_there_is_room(tokenizer: Tokenizer) -> None:
    front = FakeFront(refusal=Overloaded("the queue is full", retry_after_seconds=2.2))
    async with serving(tokenizer, front) as gateway:
        with pytest.raises(openai.RateLimitError) as refused:
            await gateway.client().chat.completions.create(model="tiny", messages=QUESTION)
    assert refused.value.code == "queue_full"
    assert refused.value.response.headers["retry-after"] == "3"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("reason", ["request_poisoned", "not_a_number", "deadline_exceeded", "nothing_to_sample"])
async def test_what_would_fail_again_is_not_sent_again(tokenizer: Tokenizer, reason: str, stream: bool) -> None:
    front = FakeFront(automatic=False)
    async with serving(tokenizer, front) as gateway:
        # With the retries that applications have unless they say otherwise.
        client = gateway.client().with_options(max_retries=openai.DEFAULT_MAX_RETRIES)
        asking = asyncio.ensure_future(client.completions.create(model="tiny", prompt="x", stream=stream))
        while not asking.done():
            for request in list(front.live):
                front.fail(request, reason)
            await asyncio.sleep(0.002)
        with pytest.raises(openai.APIStatusError) as failed:
            await asking
    assert failed.value.code == reason
    assert len(front.submitted) == 1


async def test_a_request_that_no_replica_took_is_sent_again(tokenizer: Tokenizer) -> None:
    front = FakeFront(refusal=Unavailable("no replica"))
    async with serving(tokenizer, front) as gateway:
        client = gateway.client().with_options(max_retries=openai.DEFAULT_MAX_RETRIES)
        asking = asyncio.ensure_future(client.completions.create(model="tiny", prompt="x", max_tokens=1))
        await asyncio.sleep(0.1)
        front.refusal = None
        answer = await asking
    assert answer.choices[0].finish_reason == "length"


async def test_no_replica_is_a_503(tokenizer: Tokenizer) -> None:
    async with serving(tokenizer, FakeFront(refusal=Unavailable("no replica"))) as gateway:
        with pytest.raises(openai.InternalServerError) as refused:
            await gateway.client().completions.create(model="tiny", prompt="x")
    assert (refused.value.status_code, refused.value.code) == (503, "unavailable")
