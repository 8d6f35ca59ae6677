"""Goal: what a request gets depends on the request alone: not on the company, the way it came, or deaths on the way.

Method: random requests over every sampling field, drawn from a fixed seed. The reference is `LLM`, one request at a
time; the same requests then run all at once, over HTTP and over ZeroMQ, while the worker is killed again and again. On
a slow processor, or all would be answered before the first kill is seen.
Float32, where last bits that depend on a batch's shape change one token in millions.
"""

from __future__ import annotations

import os
import random
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from llmscale import LLM, Client, SamplingParams
from llmscale.types import CompletionOutput
from tests.processes import Server, serving, wait_until
from tests.support_processes import node

pytestmark = pytest.mark.usefixtures("slow_processor")

Request = tuple[list[int], SamplingParams]
REQUESTS = 32
# After a death each sequence that was being computed runs alone for a step: so many steps later all of them are
# through, and a second death makes none of them a culprit.
STEPS_BETWEEN_KILLS = 120
EXACT = ("--dtype", "float32", "--threads", "1")


def random_params(draw: random.Random, vocabulary: int) -> SamplingParams:
    """Every field that changes what is sampled, each on in some requests and off in others."""

    def some(*values: float) -> float:
        return draw.choice(values)

    return SamplingParams(
        n=draw.choice((1, 1, 2, 3)),
        temperature=some(0, 0.5, 1, 1.5),
        top_p=some(1, 0.9, 0.5),
        top_k=int(some(0, 1, 5, 50)),
        min_p=some(0, 0.05),
        presence_penalty=some(0, 0.8),
        frequency_penalty=some(0, 0.4, -0.2),
        repetition_penalty=some(1, 1.2),
        seed=draw.getrandbits(48),
        stop=draw.choice(((), (), (" and",), (".", "the"))),
        stop_token_ids=draw.sample(range(vocabulary), draw.choice((0, 3))),
        max_tokens=draw.choice((1, 40, 120, 400)),
        min_tokens=draw.choice((0, 0, 1)),
        logprobs=draw.choice((None, 0, 2)),
        logit_bias=[(token, draw.uniform(-5, 5)) for token in draw.sample(range(vocabulary), draw.choice((0, 4)))],
        ignore_eos=draw.random() < 0.7,
        include_stop_str_in_output=draw.random() < 0.3,
    )


@pytest.fixture(scope="module")
def references(slow_processor: None) -> tuple[list[Request], list[tuple[CompletionOutput, ...]]]:
    """The requests, and what each gets when it is alone."""
    llm = LLM("tiny-chat", dtype="float32", threads=1)
    draw = random.Random(20)
    texts = ("Once upon a time", "The old sailor", "What is 23 + 45?", "Sort: 5, 3, 9", "In a small house by the sea")
    requests: list[Request] = []
    for _ in range(REQUESTS):
        prompt = llm.tokenizer.encode(" ".join(draw.choices(texts, k=draw.choice((1, 2, 12)))))
        requests.append((prompt, random_params(draw, 512)))
    alone = [llm.generate([prompt], params)[0].outputs for prompt, params in requests]
    assert sum(len(choice.token_ids) for outputs in alone for choice in outputs) > 3_000, "most requests run for long"
    assert {choice.finish_reason for outputs in alone for choice in outputs} == {"stop", "length"}
    return requests, alone


@pytest.fixture(scope="module")
def server(slow_processor: None) -> Iterator[Server]:
    with serving("tiny-chat", *EXACT) as server:
        yield server


def check(found: Sequence[CompletionOutput], expected: Sequence[CompletionOutput], *, has_ids: bool, what: str) -> None:
    """Equal but for the last bits of log probabilities; over HTTP there are texts and no ids."""
    for one, other in zip(found, expected, strict=True):
        assert one.text == other.text, what
        assert (one.finish_reason, one.stop_reason) == (other.finish_reason, other.stop_reason), what
        if has_ids:
            assert one.token_ids == other.token_ids, what
        assert (one.logprobs is None) == (other.logprobs is None), what
        for row, reference in zip(one.logprobs or (), other.logprobs or (), strict=True):
            assert row[0].text == reference[0].text, what
            assert row[0].logprob == pytest.approx(reference[0].logprob, abs=1e-3), what


def replica(server: Server) -> dict[str, Any]:
    """What the fleet says of the one node."""
    found: dict[str, Any] = server.replicas()[0]
    return found


def run_all(client: Client, requests: Sequence[Request], done: list[int]) -> list[tuple[CompletionOutput, ...]]:
    """All at once; `done` grows with every answer."""

    def run(number: int) -> tuple[CompletionOutput, ...]:
        prompt, params = requests[number]
        outputs = client.generate(prompt, params, timeout=600).outputs
        done.append(number)
        return outputs

    with ThreadPoolExecutor(len(requests)) as pool:
        return list(pool.map(run, range(len(requests))))


def test_random_requests_all_at_once_over_http_get_what_each_gets_alone(
    server: Server, references: tuple[list[Request], list[tuple[CompletionOutput, ...]]]
) -> None:
    requests, expected = references
    with Client(server.base) as client:
        answers = run_all(client, requests, [])
    for number, (found, reference) in enumerate(zip(answers, expected, strict=True)):
        check(found, reference, has_ids=False, what=f"request {number}: {requests[number]}")


@pytest.mark.timeout(900)
def test_random_requests_get_the_same_while_their_worker_is_killed_again_and_again(
    server: Server, references: tuple[list[Request], list[tuple[CompletionOutput, ...]]]
) -> None:
    requests, expected = references
    before = replica(server)["worker_restarts"]
    done: list[int] = []
    left: list[int] = []

    def kill() -> None:
        wait_until(lambda: len(done) >= 2, 120, "two answers")
        for _ in range(2):
            left.append(len(requests) - len(done))
            steps = replica(server)["steps"]
            os.kill(server.worker_pid(), signal.SIGKILL)

            def goes_on(steps: int = steps) -> bool:
                return replica(server)["steps"] >= steps + STEPS_BETWEEN_KILLS or len(done) == len(requests)

            wait_until(goes_on, 300, "steps")

    killer = threading.Thread(target=kill)
    killer.start()
    with Client(server.base) as client:
        answers = run_all(client, requests, done)
    killer.join(600)
    assert len(left) == 2
    assert left[-1] > 0, "the second kill came in the middle too"
    assert replica(server)["worker_restarts"] == before + 2
    for number, (found, reference) in enumerate(zip(answers, expected, strict=True)):
        check(found, reference, has_ids=False, what=f"request {number}: {requests[number]}")


def test_random_requests_all_at_once_on_a_node_get_what_each_gets_alone(
    references: tuple[list[Request], list[tuple[CompletionOutput, ...]]], tmp_path: Path
) -> None:
    requests, expected = references
    with node(tmp_path, *EXACT) as started, Client(started.address, tokenizer="tiny-chat") as client:
        answers = run_all(client, requests, [])
    for number, (found, reference) in enumerate(zip(answers, expected, strict=True)):
        check(found, reference, has_ids=True, what=f"request {number}: {requests[number]}")
