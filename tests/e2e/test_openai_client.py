"""Goal: the official client works unchanged. Method: the `openai` package against a real server."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest

from tests.processes import Server


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
    from tests.processes import wait_until

    stream = client.completions.create(
        model="tiny-chat", prompt="Once", max_tokens=1_500, temperature=1, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    stream.close()

    def is_idle() -> bool:
        replica = server.get("/fleet").json()["replicas"][0]
        return bool(replica["running"] == 0 and replica["free_blocks"] == replica["total_blocks"])

    wait_until(is_idle, 5, "the sequence is gone and its blocks are free")
