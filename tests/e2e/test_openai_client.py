"""Goal: the official client works unchanged. Method: the `openai` package against a real server."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.processes import Server, serving, wait_until

STORY: dict[str, Any] = {"model": "tiny-chat", "prompt": "Once upon a time", "max_tokens": 40, "temperature": 1}


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    """A client without retries, so that every error is seen."""
    with openai.OpenAI(base_url=server.base + "/v1", api_key="none", max_retries=0) as client:
        yield client


def test_a_chat_is_answered_whole_and_streamed_with_the_same_text(client: openai.OpenAI) -> None:
    messages = [{"role": "user", "content": "What is 23 + 45?"}]
    whole = client.chat.completions.create(model="tiny-chat", messages=messages, temperature=0)
    stream = client.chat.completions.create(
        model="tiny-chat", messages=messages, temperature=0, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content == "68"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert whole.choices[0].finish_reason == "stop"


def test_a_seed_gives_the_same_text_and_another_seed_another(client: openai.OpenAI) -> None:
    def text(seed: int) -> str:
        return (
            client.completions.create(
                model="tiny-chat", prompt="Once upon a time", max_tokens=40, temperature=1, seed=seed
            )
            .choices[0]
            .text
        )

    assert text(1) == text(1)
    assert text(1) != text(2)


def test_logprobs_name_the_chosen_token_and_the_best_ones(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="tiny-chat",
        messages=[{"role": "user", "content": "What is 2 + 2?"}],
        temperature=0,
        logprobs=True,
        top_logprobs=3,
    )
    content = answer.choices[0].logprobs.content
    assert content
    for entry in content:
        assert len(entry.top_logprobs) == 3
        # Greedy: the chosen token is the best one.
        assert entry.logprob == entry.top_logprobs[0].logprob <= 0


def test_a_stop_string_ends_the_text_before_it(client: openai.OpenAI) -> None:
    free = client.completions.create(model="tiny-chat", prompt="Once upon a time", max_tokens=40, temperature=0)
    word = free.choices[0].text.split()[5]
    cut = client.completions.create(
        model="tiny-chat", prompt="Once upon a time", max_tokens=40, temperature=0, stop=[word]
    )
    assert cut.choices[0].text == free.choices[0].text[: free.choices[0].text.index(word)]
    assert cut.choices[0].finish_reason == "stop"
    assert cut.usage.completion_tokens < free.usage.completion_tokens


def test_what_was_cached_is_told_however_an_answer_ends(client: openai.OpenAI) -> None:
    asked = {"model": "tiny-chat", "prompt": "The fox counts its steps. " * 20, "max_tokens": 40, "temperature": 0}
    free = client.completions.create(**asked)
    word = free.choices[0].text.split()[5]
    whole = client.completions.create(**asked, stop=[word])
    *_, last = client.completions.create(**asked, stop=[word], stream=True, stream_options={"include_usage": True})
    assert whole.choices[0].finish_reason == "stop"
    for usage in (whole.usage, last.usage):
        assert usage.completion_tokens < 40
        assert usage.prompt_tokens_details.cached_tokens >= 64


@pytest.mark.parametrize(
    "fields",
    [{"seed": 3}, {"seed": 3, "logprobs": 3}, {"seed": 3, "n": 3, "logprobs": 0}, {"seed": 3, "stop": ["the", "a "]}],
    ids=["seed", "logprobs", "choices", "stop"],
)
def test_a_streamed_completion_is_the_whole_one_in_pieces(client: openai.OpenAI, fields: dict[str, Any]) -> None:
    whole = client.completions.create(**STORY, **fields)
    stream = client.completions.create(**STORY, **fields, stream=True, stream_options={"include_usage": True})
    text: dict[int, str] = {choice.index: "" for choice in whole.choices}
    rows: dict[int, list[tuple[Any, ...]]] = {choice.index: [] for choice in whole.choices}
    ends: dict[int, str] = {}
    usage = None
    for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            assert choice.index not in ends, "nothing of a choice comes after its end"
            text[choice.index] += choice.text
            rows[choice.index] += token_rows(choice.logprobs)
            if choice.finish_reason is not None:
                ends[choice.index] = choice.finish_reason
    assert text == {choice.index: choice.text for choice in whole.choices}
    assert rows == {choice.index: token_rows(choice.logprobs) for choice in whole.choices}
    assert ends == {choice.index: choice.finish_reason for choice in whole.choices}
    assert usage is not None
    assert whole.usage is not None
    # How much of the prompt was cached differs from one run to the next.
    assert (usage.prompt_tokens, usage.completion_tokens) == (whole.usage.prompt_tokens, whole.usage.completion_tokens)


def token_rows(logprobs: Any) -> list[tuple[Any, ...]]:
    """Token, log probability, alternatives and place in the text, one row for each token."""
    if logprobs is None:
        return []
    columns = (logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, logprobs.text_offset)
    return list(zip(*columns, strict=True))


def test_a_streamed_chat_has_the_log_probabilities_of_the_whole_one(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {
        "model": "tiny-chat",
        "messages": [{"role": "user", "content": "What is 23 + 45?"}],
        "temperature": 0,
        "logprobs": True,
        "top_logprobs": 2,
    }
    whole = client.chat.completions.create(**asked).choices[0]
    rows = [
        row
        for chunk in client.chat.completions.create(**asked, stream=True)
        for row in (chunk.choices[0].logprobs.content if chunk.choices[0].logprobs else [])
    ]
    assert whole.logprobs is not None
    assert rows == whole.logprobs.content
    shown = b"".join(bytes(row.bytes) for row in rows).decode()
    assert shown.startswith(whole.message.content)


async def test_many_streams_of_the_asynchronous_client_do_not_mix(server: Server) -> None:
    async with openai.AsyncOpenAI(base_url=server.base + "/v1", api_key="none", max_retries=0) as client:

        async def text(seed: int) -> str:
            # Sixteen at once are other batches than one alone, which in bfloat16 moves last bits: few tokens, so that
            # none of them changes.
            stream = await client.completions.create(**(STORY | {"max_tokens": 12}), seed=seed, stream=True)
            return "".join([chunk.choices[0].text async for chunk in stream])

        alone = [await text(seed) for seed in range(4)]
        assert len(set(alone)) == 4
        assert await asyncio.gather(*(text(number % 4) for number in range(16))) == alone * 4


def test_a_server_with_keys_lets_the_client_in_with_its_key_alone() -> None:
    key = "a-key-of-this-test-0123456789"
    with serving("tiny-chat", "--threads", "1", "--api-key", key) as server:
        base = server.base + "/v1"
        with openai.OpenAI(base_url=base, api_key=key, max_retries=0) as client:
            assert client.completions.create(**STORY).usage.completion_tokens == 40
        for wrong in ("none", key[:-1], key + "0"):
            with (
                openai.OpenAI(base_url=base, api_key=wrong, max_retries=0) as client,
                pytest.raises(openai.AuthenticationError) as refused,
            ):
                client.completions.create(**STORY)
            assert key not in str(refused.value)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": -1}, "temperature"),
        ({"top_p": 2}, "top_p"),
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"logit_bias": {"999999": 1}}, "logit_bias"),
        ({"suffix": "end"}, "suffix"),
        ({"best_of": 3}, "best_of"),
        ({"extra_body": {"stop_token_ids": [1 << 20]}}, "stop_token_ids"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_field_that_cannot_be_served_is_refused_by_name(
    client: openai.OpenAI, fields: dict[str, Any], param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(**(STORY | fields))
    assert refused.value.param == param
    assert refused.value.code


def test_several_choices_differ_and_are_all_billed(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="tiny-chat", prompt="Once upon a time", max_tokens=20, temperature=1, seed=7, n=3
    )
    assert len({choice.text for choice in answer.choices}) == 3
    assert answer.usage.completion_tokens == 60


def test_errors_are_openai_errors_with_a_code(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as unknown:
        client.completions.create(model="no-such-model", prompt="x")
    assert unknown.value.code == "unknown_model"
    with pytest.raises(openai.BadRequestError) as too_long:
        client.completions.create(model="tiny-chat", prompt="x", max_tokens=1_000_000)
    assert too_long.value.code in {"request_too_long", "invalid_field"}


def test_a_closed_stream_frees_its_sequence(client: openai.OpenAI, server: Server) -> None:
    stream = client.completions.create(
        model="tiny-chat", prompt="Once", max_tokens=1_500, temperature=1, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    stream.close()

    def is_idle() -> bool:
        replica = server.replicas()[0]
        return bool(replica["running"] == 0 and replica["free_blocks"] == replica["total_blocks"])

    wait_until(is_idle, 120, "the sequence is gone and its blocks are free")
