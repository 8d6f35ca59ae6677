"""Goal: a replica of several worker processes answers as one does, and loses no token with one of them.

Method: real nodes on tiny-chat in float32, cut along tensors, layers or both; ids of concurrent streams over ZeroMQ,
each sampled in another way, are compared with those of one worker; a rank is killed in the middle of them.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from llmscale import Client, SamplingParams
from tests.family import alive_after, workers_of
from tests.processes import wait_until
from tests.support_processes import NodeProcess, node

TOKENS = 150
WAYS = (
    SamplingParams(temperature=0.8),
    SamplingParams(temperature=0.8, repetition_penalty=1.2, presence_penalty=0.3, frequency_penalty=0.2),
    SamplingParams(temperature=1.0, top_k=20, top_p=0.9, logprobs=4),
    SamplingParams(temperature=1.1, min_p=0.02, logit_bias=[(7, 4.0), (11, -100.0)]),
    SamplingParams(temperature=0.9, stop_token_ids=(5, 9, 13), max_tokens=TOKENS, min_tokens=TOKENS),
    SamplingParams(temperature=0.0, logprobs=0),
)
"""One per stream."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a stream gave: ids, and by position the log probabilities of the most likely ids and the drawn one."""

    ids: list[int] = field(default_factory=list)
    logprobs: list[dict[int, float]] = field(default_factory=list)


def assert_same(found: list[Answer], expected: list[Answer]) -> None:
    """Equal ids, and log probabilities but for the order in which ranks add."""
    assert [answer.ids for answer in found] == [answer.ids for answer in expected]
    for one, other in zip(found, expected, strict=True):
        assert one.logprobs == [pytest.approx(row, abs=1e-3) for row in other.logprobs]


def answers(running: NodeProcess, on_token: Callable[[int], None] | None = None) -> list[Answer]:
    """Concurrent streams of different lengths and ways to sample; calls back with the tokens of the first one."""
    with Client(running.address, tokenizer="tiny-chat") as client, ThreadPoolExecutor(len(WAYS)) as pool:

        def ask(number: int) -> Answer:
            params = replace(WAYS[number], max_tokens=TOKENS, seed=number, ignore_eos=True)
            answer = Answer()
            with client.stream("Once upon a time" + " and" * number, params, timeout=300) as stream:
                for chunk in stream:
                    answer.ids.extend(chunk.token_ids)
                    for row in chunk.logprobs or ():
                        answer.logprobs.append({entry.token_id: entry.logprob for entry in row})
                    if on_token is not None and number == 0:
                        on_token(len(answer.ids))
            assert len(answer.ids) == TOKENS
            assert len(answer.logprobs) == (0 if params.logprobs is None else TOKENS)
            return answer

        return list(pool.map(ask, range(len(WAYS))))


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> list[Answer]:
    with node(tmp_path_factory.mktemp("alone"), "--dtype", "float32", "--no-spare-worker") as running:
        return answers(running)


@pytest.mark.parametrize("layout", [("-tp", "2"), ("-pp", "2"), ("-tp", "2", "-pp", "2")], ids="".join)
def test_ranks_answer_as_one_worker_does(layout: tuple[str, ...], expected: list[Answer], tmp_path: Path) -> None:
    with node(tmp_path, "--dtype", "float32", "--no-spare-worker", *layout) as running:
        assert_same(answers(running), expected)


@pytest.mark.parametrize(("layout", "victim"), [("-tp", 1), ("-pp", 0)])
def test_a_killed_rank_costs_its_streams_time_only(
    layout: str, victim: int, expected: list[Answer], tmp_path: Path
) -> None:
    with node(tmp_path, "--dtype", "float32", layout, "2") as running:
        group, killed = workers_of(running.process.pid), list[int]()

        def kill(tokens: int) -> None:
            if tokens >= 20 and not killed:
                killed.append(tokens)
                group[victim].kill()

        assert_same(answers(running, kill), expected)
        assert killed
        wait_until(lambda: "worker died" in running.log(), 120, "the death is told")
        gone = alive_after(group, 60)
        assert not gone, "the ranks of a dead group do not live on"


@pytest.mark.parametrize(("layout", "victim"), [("-tp", 0), ("-pp", 1)])
def test_a_hung_rank_is_replaced_with_its_group_after_the_longest_step(
    layout: str, victim: int, expected: list[Answer], tmp_path: Path
) -> None:
    with node(tmp_path, "--dtype", "float32", layout, "2", "--max-step-seconds", "5") as running:
        group, stopped = workers_of(running.process.pid), list[int]()

        def stop(tokens: int) -> None:
            if tokens >= 20 and not stopped:
                stopped.append(tokens)
                group[victim].suspend()

        assert_same(answers(running, stop), expected)
        assert stopped
        if "longer than" not in running.log():
            # The reader was late, and the last token was computed by then: the next step is the one that hangs.
            assert_same(answers(running), expected)
        assert "longer than" in running.log()
        assert not alive_after(group, 60), "a stopped process is killed like any other"


def test_a_model_that_cannot_be_cut_so_is_refused_before_anything_starts(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "llmscale.node", "--model", "tiny-chat", "--listen", f"ipc://{tmp_path}/node"]
    refused = subprocess.run([*command, "-tp", "3"], capture_output=True, text=True, timeout=300, check=False)
    assert refused.returncode == 1
    assert "can be cut into 1, 2, 4, 8" in refused.stderr + refused.stdout
    assert "worker started" not in refused.stderr + refused.stdout
