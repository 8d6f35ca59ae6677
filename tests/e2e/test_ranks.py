"""Goal: a replica of several worker processes answers as one does, and loses no token with one of them.

Method: real nodes on tiny-chat in float32, cut along tensors, layers or both; ids of concurrent streams over ZeroMQ are
compared with those of a node with one worker; one rank is killed in the middle of them.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from llmscale import Client, SamplingParams
from tests.family import alive_after
from tests.processes import wait_until
from tests.support_processes import NodeProcess, node

STREAMS = 6
TOKENS = 150


def answers(running: NodeProcess, on_token: Callable[[int], None] | None = None) -> list[list[int]]:
    """Ids of concurrent streams of different lengths and seeds; calls back with the tokens of the first one."""
    with Client(running.address, tokenizer="tiny-chat") as client, ThreadPoolExecutor(STREAMS) as pool:

        def ask(number: int) -> list[int]:
            params = SamplingParams(max_tokens=TOKENS, temperature=0.8, seed=number, ignore_eos=True)
            ids: list[int] = []
            with client.stream("Once upon a time" + " and" * number, params, timeout=60) as stream:
                for chunk in stream:
                    ids += chunk.token_ids
                    if on_token is not None and number == 0:
                        on_token(len(ids))
            return ids

        return list(pool.map(ask, range(STREAMS)))


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> list[list[int]]:
    with node(tmp_path_factory.mktemp("alone"), "--dtype", "float32", "--no-spare-worker") as running:
        return answers(running)


def ranks_of(running: NodeProcess) -> list[psutil.Process]:
    """The worker processes of the first epoch, by rank."""
    return sorted(psutil.Process(running.process.pid).children(), key=lambda child: (child.create_time(), child.pid))


@pytest.mark.timeout(180)
@pytest.mark.parametrize("layout", [("-tp", "2"), ("-pp", "2"), ("-tp", "2", "-pp", "2")], ids="".join)
def test_ranks_answer_as_one_worker_does(layout: tuple[str, ...], expected: list[list[int]], tmp_path: Path) -> None:
    with node(tmp_path, "--dtype", "float32", "--no-spare-worker", *layout) as running:
        assert answers(running) == expected


@pytest.mark.timeout(180)
@pytest.mark.parametrize(("layout", "victim"), [("-tp", 1), ("-pp", 0)])
def test_a_killed_rank_costs_its_streams_time_only(
    layout: str, victim: int, expected: list[list[int]], tmp_path: Path
) -> None:
    with node(tmp_path, "--dtype", "float32", layout, "2") as running:
        wait_until(lambda: len(ranks_of(running)) == 4, 60, "two ranks and two spares")
        group, killed = ranks_of(running)[:2], list[int]()

        def kill(tokens: int) -> None:
            if tokens >= 20 and not killed:
                killed.append(tokens)
                group[victim].kill()

        assert answers(running, kill) == expected
        assert killed
        assert "worker died" in running.log()
        gone = alive_after(group, 5)
        assert not gone, "the ranks of a dead group do not live on"


@pytest.mark.timeout(180)
@pytest.mark.parametrize(("layout", "victim"), [("-tp", 0), ("-pp", 1)])
def test_a_hung_rank_is_replaced_with_its_group_after_the_longest_step(
    layout: str, victim: int, expected: list[list[int]], tmp_path: Path
) -> None:
    with node(tmp_path, "--dtype", "float32", layout, "2", "--max-step-seconds", "5") as running:
        wait_until(lambda: len(ranks_of(running)) == 4, 60, "two ranks and two spares")
        group, stopped = ranks_of(running)[:2], list[int]()

        def stop(tokens: int) -> None:
            if tokens >= 20 and not stopped:
                stopped.append(tokens)
                group[victim].suspend()

        assert answers(running, stop) == expected
        assert stopped
        assert "longer than" in running.log()
        assert not alive_after(group, 5), "a stopped process is killed like any other"


def test_a_model_that_cannot_be_cut_so_is_refused_before_anything_starts(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "llmscale.node", "--model", "tiny-chat", "--listen", f"ipc://{tmp_path}/node"]
    refused = subprocess.run([*command, "-tp", "3"], capture_output=True, text=True, timeout=60, check=False)
    assert refused.returncode == 1
    assert "can be cut into 1, 2, 4, 8" in refused.stderr + refused.stdout
    assert "worker started" not in refused.stderr + refused.stdout
