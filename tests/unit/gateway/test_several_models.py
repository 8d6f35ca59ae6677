"""One gateway with two models that share nothing: each has its own text, limits, state and figures, and what a replica
of neither says changes none of that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import httpx2
import openai
import pytest

from llmscale.errors import UnknownModel
from llmscale.gateway.config import ServedModel
from llmscale.gateway.replicas import ReplicaWatch, differences, fleet_state, model_states
from llmscale.tokenizer import Tokenizer
from tests.captured_logs import captured_logs
from tests.fakes.fake_front import FakeFront, FakeReplica
from tests.fakes.gateway_server import Serving, serving
from tests.fakes.tiny_tokenizer import write_metaspace

HELLO: Any = [{"role": "user", "content": "hello world"}]


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> ServedModel:
    """A model with another tokenizer, another template and other bounds than `tiny`."""
    tokenizer = Tokenizer(write_metaspace(tmp_path_factory.mktemp("second")))
    return ServedModel("second", tokenizer, vocabulary=600, max_sequence_tokens=64, created=2)


def replicas(tiny: str = "ready", other: str = "ready") -> list[FakeReplica]:
    return [
        FakeReplica(node="a", state=tiny, running=1),
        FakeReplica(node="b", state=other, running=2, model="second", max_sequence_tokens=64, vocabulary=600),
    ]


def answering(tiny: Tokenizer, other: ServedModel) -> FakeFront:
    """A front whose models answer with their own tokenizers, told apart by the ids of their prompts."""
    answers = {
        tuple(tiny.encode_chat(HELLO)): [*tiny.encode("the quick brown fox"), 2],
        tuple(other.tokenizer.encode_chat(HELLO)): [*other.tokenizer.encode("stop there.")[1:], 2],
    }
    tokens: Callable[..., Iterator[int]] = lambda prompt, _sampling: iter(answers[tuple(prompt)])  # noqa: E731
    return FakeFront(tokens=tokens, eos=frozenset({2}), replicas=replicas())


async def get(gateway: Serving, path: str) -> httpx2.Response:
    async with httpx2.AsyncClient(base_url=gateway.url) as client:
        return await client.get(path)


async def test_each_model_reads_and_writes_with_its_own_tokenizer_and_template(
    tokenizer: Tokenizer, other: ServedModel
) -> None:
    front = answering(tokenizer, other)
    async with serving(tokenizer, front, more_models=[other]) as gateway:
        client = gateway.client()
        texts = {
            name: (await client.chat.completions.create(model=name, messages=HELLO)).choices[0].message.content
            for name in ("tiny", "second")
        }
    assert texts == {"tiny": "the quick brown fox", "second": "stop there."}
    assert [(one.model, one.prompt) for one in front.submitted.values()] == [
        ("tiny", tokenizer.encode_chat(HELLO)),
        ("second", other.tokenizer.encode_chat(HELLO)),
    ]


async def test_a_completion_goes_on_from_its_prompt_also_where_the_first_word_of_a_text_has_no_space(
    tokenizer: Tokenizer, other: ServedModel
) -> None:
    answer = [*other.tokenizer.encode("stop there.")[1:], 2]
    front = FakeFront(tokens=lambda *_: iter(answer), eos=frozenset({2}), replicas=replicas())
    asked: dict[str, Any] = {"model": "second", "prompt": "hello", "max_tokens": 30}
    async with serving(tokenizer, front, more_models=[other]) as gateway:
        create = gateway.client().completions.create
        plain = (await create(**asked, logprobs=0)).choices[0]
        echoed = (await create(**asked, echo=True)).choices[0]
        streamed = "".join([event.choices[0].text async for event in await create(**asked, stream=True)])
        stopped = (await create(**asked, stop=[" stop"])).choices[0]
    assert (plain.text, streamed, echoed.text) == (" stop there.", " stop there.", "hello stop there.")
    assert (stopped.text, stopped.finish_reason) == ("", "stop")
    assert plain.logprobs is not None
    pieces = zip(plain.logprobs.text_offset or [], plain.logprobs.tokens or [], strict=True)
    for offset, piece in list(pieces)[:-1]:
        assert plain.text[offset : offset + len(piece)] == piece


async def test_all_models_are_listed_and_an_unknown_one_is_refused_with_the_list(
    tokenizer: Tokenizer, other: ServedModel
) -> None:
    front = FakeFront(replicas=[*replicas(), FakeReplica(node="c", model="stranger")])
    async with serving(tokenizer, front, more_models=[other], max_sequence_tokens=4_096) as gateway:
        client = gateway.client()
        listed = {model.id: model.model_dump()["max_model_len"] async for model in client.models.list()}
        refusals = []
        for name in ("tiny-", "stranger"):
            with pytest.raises(openai.NotFoundError) as caught:
                await client.chat.completions.create(model=name, messages=HELLO)
            refusals.append(caught.value)
    assert listed == {"tiny": 4_096, "second": 64}
    for refused in refusals:
        assert refused.code == "unknown_model"
        assert "served are: second, tiny" in refused.message
    assert front.submitted == {}


async def test_a_model_whose_first_replica_has_not_come_yet_is_not_unknown(
    tokenizer: Tokenizer, other: ServedModel
) -> None:
    front = FakeFront(refusal=UnknownModel("the model is not served here"))
    async with serving(tokenizer, front, more_models=[other]) as gateway:
        with pytest.raises(openai.InternalServerError, match="no replica of second has been seen yet") as refused:
            await gateway.client().chat.completions.create(model="second", messages=HELLO)
    assert (refused.value.status_code, refused.value.code) == (503, "unavailable")


async def test_the_bounds_of_one_model_do_not_hold_for_another(tokenizer: Tokenizer, other: ServedModel) -> None:
    front = FakeFront(replicas=replicas())
    async with serving(tokenizer, front, more_models=[other], max_sequence_tokens=4_096) as gateway:
        client = gateway.client()
        body: dict[str, Any] = {"prompt": "hello", "max_tokens": 70, "extra_body": {"ignore_eos": True}}
        answer = await client.completions.create(model="tiny", **body)
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 70
        with pytest.raises(openai.BadRequestError, match="maximum context length is 64 tokens"):
            await client.completions.create(model="second", **body)
        ids: dict[str, Any] = {"prompt": [550], "max_tokens": 1}
        await client.completions.create(model="second", **ids)
        with pytest.raises(openai.BadRequestError, match="the vocabulary is 512"):
            await client.completions.create(model="tiny", **ids)


@pytest.mark.parametrize(
    ("tiny", "second", "status", "said", "state"),
    [
        ("ready", "ready", 200, '{"status":"ready"}', "ready"),
        ("ready", "recovering", 200, '{"status":"recovering"}', "recovering"),
        ("ready", "starting", 503, "no replica of second (starting) is ready", "starting"),
        ("down", "ready", 503, "no replica of tiny (down) is ready", "down"),
        ("starting", "draining", 503, "no replica of tiny (starting), second (down) is ready", "down"),
    ],
)
async def test_a_gateway_is_ready_when_every_model_has_a_replica_that_is(
    tokenizer: Tokenizer, other: ServedModel, tiny: str, second: str, status: int, said: str, state: str
) -> None:
    front = FakeFront(replicas=[*replicas(tiny, second), FakeReplica(node="c", model="stranger")])
    async with serving(tokenizer, front, more_models=[other]) as gateway:
        ready = await get(gateway, "/health/ready")
        health = await get(gateway, "/health")
        fleet = (await get(gateway, "/fleet")).json()
    assert ready.status_code == health.status_code == status
    assert said in ready.text
    assert health.json() == ready.json()
    assert fleet["state"] == state
    assert [model["name"] for model in fleet["models"]] == ["tiny", "second"]
    assert [replica["model"] for replica in fleet["replicas"]] == ["tiny", "second", "stranger"]


async def test_the_fleet_says_which_replica_is_left_alone_and_why(tokenizer: Tokenizer) -> None:
    ejected = FakeReplica(
        node="b", trust="ejected", ejections=2, recent_answers=3, recent_late=1, recent_failures=6, worker_restarts=4
    )
    front = FakeFront(replicas=[FakeReplica(node="a"), ejected])
    front.counts = {
        "ejections": 2,
        "retries": 7,
        "retries_delayed": 1,
        "hedges": 5,
        "hedge_wins": 4,
        "hedged_tokens": 60,
    }
    async with serving(tokenizer, front) as gateway:
        fleet = (await get(gateway, "/fleet")).json()
    names = ("node", "state", "trust", "ejections", "recent_answers", "recent_late", "recent_failures")
    assert [[one[name] for name in names] for one in fleet["replicas"]] == [
        ["a", "ready", "trusted", 0, 0, 0, 0],
        ["b", "ready", "ejected", 2, 3, 1, 6],
    ]
    assert fleet["attempts"] == {
        "lost_attempts": 0,
        "moved_attempts": 0,
        "failed_probes": 0,
        "spared_replicas": 0,
        "repeated_retries": 0,
        "first_attempt_tokens": 0,
        **front.counts,
    }


def test_one_replica_that_is_ready_is_enough_for_its_model() -> None:
    found = [FakeReplica(state=state) for state in ("down", "starting", "ready", "recovering", "draining")]
    assert model_states(["tiny", "second"], found) == {"tiny": "ready", "second": "down"}
    assert fleet_state({}) == "down"


async def test_figures_are_labelled_with_served_models_only(tokenizer: Tokenizer, other: ServedModel) -> None:
    strangers = [FakeReplica(node=f"c{number}", running=9, model=f"stranger-{number}") for number in range(2)]
    front = answering(tokenizer, other)
    front.replicas += strangers
    async with serving(tokenizer, front, more_models=[other]) as gateway:
        await gateway.client().chat.completions.create(model="second", messages=HELLO)
        text = (await get(gateway, "/metrics")).text
    assert 'llmscale:request_success_total{finished_reason="stop",model_name="second"} 1.0' in text
    assert 'llmscale:request_success_total{finished_reason="stop",model_name="tiny"} 0.0' in text
    running = [line for line in text.splitlines() if line.startswith("llmscale:num_requests_running{")]
    assert running == [
        'llmscale:num_requests_running{model_name="tiny",node="a"} 1.0',
        'llmscale:num_requests_running{model_name="second",node="b"} 2.0',
        'llmscale:num_requests_running{model_name="other",node="c0"} 9.0',
        'llmscale:num_requests_running{model_name="other",node="c1"} 9.0',
    ]


def test_a_model_takes_what_its_widest_replica_takes_and_no_more_than_it_was_given(other: ServedModel) -> None:
    models = {"second": other}
    front = FakeFront(replicas=[FakeReplica(model="second", vocabulary=600, max_sequence_tokens=0, state="down")])
    watch = ReplicaWatch(front, models)

    def limit(*lengths: int) -> int:
        front.replicas = [FakeReplica(model="second", vocabulary=600, max_sequence_tokens=length) for length in lengths]
        watch.look()
        return models["second"].max_sequence_tokens

    assert limit(0) == 64
    assert limit(16) == 16
    assert limit(16, 32) == 32
    assert limit(16, 128) == 64


def test_what_differs_between_replicas_of_one_name_is_said_once(other: ServedModel) -> None:
    front = FakeFront(replicas=replicas())
    watch = ReplicaWatch(front, {"second": other})
    with captured_logs() as before:
        watch.look()
    assert [line["what"] for line in before] == ["nodes serve 'tiny', which this gateway does not: name it to serve it"]
    front.replicas.append(FakeReplica(node="c", model="second", vocabulary=512, max_sequence_tokens=32))
    with captured_logs() as after:
        watch.look()
        watch.look()
    assert [line["log_level"] for line in after] == ["warning", "warning"]
    assert "replicas of second have 512 and 600 token ids, this gateway's folder has 600" in after[0]["what"]
    assert "replicas of second take sequences of 32 and 64 tokens" in after[1]["what"]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (
            {"tokenizer_digest": "cc" * 32},
            "have the tokenizer bbbbbbbbbbbb and cccccccccccc, this gateway has bbbbbbbbbbbb",
        ),
        ({"weights_digest": "dd" * 32}, "have the weights aaaaaaaaaaaa and dddddddddddd: these are two models"),
        ({"numerics": "b+float32"}, "compute as a+bfloat16 and b+float32: a stream that moves"),
        ({"max_sequence_tokens": 63}, "take sequences of 63 and 64 tokens"),
        ({"vocabulary": 601}, "have 600 and 601 token ids, this gateway's folder has 600"),
    ],
)
def test_each_difference_is_named_with_both_values(other: ServedModel, changed: dict[str, Any], said: str) -> None:
    model = replace(other, tokenizer_digest="bb" * 32)
    one = FakeReplica(model="second", vocabulary=600, max_sequence_tokens=64)
    assert differences(model, [one, one]) == []
    found = differences(model, [one, replace(one, **changed)])
    assert len(found) == 1
    assert said in found[0]


def test_a_tokenizer_that_all_replicas_share_and_the_gateway_does_not_is_named(other: ServedModel) -> None:
    one = FakeReplica(model="second", vocabulary=600, max_sequence_tokens=64)
    model = replace(other, tokenizer_digest="ee" * 32)
    assert [
        "have the tokenizer bbbbbbbbbbbb, this gateway has eeeeeeeeeeee" in text for text in differences(model, [one])
    ] == [True]
    assert differences(other, [one]) == [], "without a folder there is nothing to compare"


def test_names_that_change_for_ever_do_not_fill_the_memory(other: ServedModel) -> None:
    front = FakeFront()
    watch = ReplicaWatch(front, {"second": other})
    with captured_logs() as said:
        for number in range(2_000):
            front.replicas = [FakeReplica(model=f"m{number}")]
            watch.look()
    assert len(said) == 1_024
