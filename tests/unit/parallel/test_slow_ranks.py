"""Goal: ranks that load their weights much later than others are waited for, for longer than meeting may take.

Method: two processes that meet within seconds, of which one is then slower than that; on CPUs as a worker, and with
what GPUs use before their KV caches are made.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnContext
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest
import torch

from llmscale.config import NodeSettings
from llmscale.errors import WorkerError
from llmscale.models.shard import RankPlace
from llmscale.node.plan import plan_replica
from llmscale.parallel import groups
from llmscale.parallel.assignment import Meeting
from llmscale.parallel.groups import World, join_world
from llmscale.worker import model_runner
from llmscale.worker.runner import RunnerOptions

MEETING_SECONDS = 4.0
PATIENCE_SECONDS = 120
Rank = Callable[[int, Meeting, Barrier], object]


def worker(rank: int, meeting: Meeting, all_ready: Barrier) -> object:
    """A rank on the CPU; the second one reads its weights slowly."""
    load = model_runner.load_weights

    def slow(*arguments: object) -> object:
        time.sleep(rank * (MEETING_SECONDS + 1))
        return load(*arguments)  # type: ignore[arg-type]

    model_runner.load_weights = slow  # type: ignore[assignment]
    settings = NodeSettings("tiny-chat-mini", "", dtype="float32", device="cpu", executor="torch", max_sequences=4)
    plan = plan_replica(settings)
    place = RankPlace(rank, 2)
    options = RunnerOptions(dtype=plan.dtype, threads=1, place=place, meeting=meeting)
    runner = model_runner.ModelRunner(plan.folder, plan.limits, options)
    # An engine sends no step before.
    all_ready.wait(PATIENCE_SECONDS)
    return runner.tensor.sum(torch.ones(1)).tolist()


def count(rank: int, meeting: Meeting, _: Barrier) -> object:
    world = join_world(RankPlace(rank, 2), meeting)
    assert world is not None
    time.sleep(rank * (MEETING_SECONDS + 1))
    return world.least(7 - rank)


def run(rank: int, work: Rank, rendezvous: str, begin: Barrier, answer: Connection) -> None:
    begin.wait(PATIENCE_SECONDS)
    answer.send(work(rank, Meeting(rendezvous=rendezvous, max_wait_seconds=MEETING_SECONDS), begin))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(("work", "expected"), [(worker, [2.0]), (count, 6)])
def test_a_rank_that_loads_for_longer_than_ranks_may_take_to_meet_is_waited_for(
    tmp_path: Path, work: Rank, expected: object
) -> None:
    context = SpawnContext()
    begin = context.Barrier(2)
    ends = [context.Pipe(duplex=False) for _ in range(2)]
    where = f"file://{tmp_path / 'store'}"
    processes = [context.Process(target=run, args=(rank, work, where, begin, ends[rank][1])) for rank in range(2)]
    for process in processes:
        process.start()
    try:
        for _, sender in ends:
            # A process that dies ends its pipe.
            sender.close()
        assert all(receiver.poll(PATIENCE_SECONDS) for receiver, _ in ends), "both ranks answer"
        assert [receiver.recv() for receiver, _ in ends] == [expected, expected]
        for process in processes:
            process.join(30)
        assert [process.exitcode for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()


def test_a_rank_that_never_loads_is_not_waited_for_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    class Ranks:
        def rank(self) -> int:
            return 0

        def size(self) -> int:
            return 2

    monkeypatch.setattr(groups, "MAX_LOADING_SECONDS", 0.05)
    world = World(Ranks(), None, torch.distributed.HashStore(), "lo", on_cpus=True)  # type: ignore[arg-type]
    with pytest.raises(WorkerError, match="rank 0 was not told what the others have room for"):
        world.least(3)
