"""Goal: ranks that load their weights much later than others are waited for, for longer than meeting may take; one that
does not come to a sum is not.

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
from llmscale.parallel.tensor import TorchGroup
from llmscale.worker import model_runner
from llmscale.worker.runner import RunnerOptions
from tests.processes import wait_until

MEETING_SECONDS = 15.0
PATIENCE_SECONDS = 120
Rank = Callable[[int, Meeting, Barrier], object]


def come_late(rank: int) -> None:
    """The second rank only, and when meeting would be over: a deadline is nothing to wait for but time."""
    late = time.monotonic() + rank * (MEETING_SECONDS + 1)
    wait_until(lambda: time.monotonic() >= late, PATIENCE_SECONDS, "the deadline has passed")


def worker(rank: int, meeting: Meeting, all_ready: Barrier) -> object:
    """A rank on the CPU; the second one reads its weights slowly."""
    load = model_runner.load_weights

    def slow(*arguments: object) -> object:
        come_late(rank)
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
    come_late(rank)
    return world.least(7 - rank)


def alone(rank: int, meeting: Meeting, it_has_ended: Barrier) -> object:
    """A sum of GPUs that the second rank never comes to, with another backend."""
    groups.BACKENDS["apart"] = "gloo"
    world = join_world(RankPlace(rank, 2), meeting, device="apart")
    assert world is not None
    assert world.stage is not None
    found = "elsewhere" if rank == 1 else "nobody was missed"
    if rank == 0:
        try:
            TorchGroup(world.stage).sum(torch.ones(1))
        except RuntimeError as error:
            found = "timed out" if "timed out" in str(error).lower() else str(error)
    it_has_ended.wait(PATIENCE_SECONDS / 2)
    return found


def run(rank: int, work: Rank, rendezvous: str, begin: Barrier, answer: Connection) -> None:
    begin.wait(PATIENCE_SECONDS)
    meeting = Meeting(rendezvous=rendezvous, max_wait_seconds=MEETING_SECONDS, max_exchange_seconds=MEETING_SECONDS)
    answer.send(work(rank, meeting, begin))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(("work", "expected"), [(worker, [2.0]), (count, 6)])
def test_a_rank_that_loads_for_longer_than_ranks_may_take_to_meet_is_waited_for(
    tmp_path: Path, work: Rank, expected: object
) -> None:
    assert answers(tmp_path, work) == [expected, expected]


def test_a_sum_that_a_rank_does_not_come_to_ends_at_the_deadline_of_its_replica(tmp_path: Path) -> None:
    """Torch's own is ten minutes, or half an hour."""
    assert answers(tmp_path, alone) == ["timed out", "elsewhere"]


def answers(tmp_path: Path, work: Rank) -> list[object]:
    """What each of two ranks says."""
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
        found: list[object] = [receiver.recv() for receiver, _ in ends]
        for process in processes:
            process.join(PATIENCE_SECONDS)
        assert [process.exitcode for process in processes] == [0, 0]
        return found
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
