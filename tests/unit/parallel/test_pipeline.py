"""Stages exchange streams and ids in order, and a send does not wait for a receiver that is busy elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnContext
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed import HashStore

from llmscale._core import RankStreams
from llmscale.errors import WorkerError
from llmscale.models.shard import RankPlace
from llmscale.node.rank_meeting import RankMeeting
from llmscale.parallel.assignment import Meeting
from llmscale.parallel.groups import join_stages, join_world
from llmscale.parallel.layout import HostLayout
from llmscale.parallel.pipeline import StageLink, StreamEdge
from llmscale.parallel.streams import Circle, open_streams

STEPS = 12
HIDDEN = 48


def stream(step: int, rows: int) -> torch.Tensor:
    return torch.arange(rows * HIDDEN, dtype=torch.float32).reshape(rows, HIDDEN) + step


def first_stage(link: StageLink, rows: list[int], ahead: int) -> list[list[int]]:
    """Sends `ahead` steps before it asks for the first one's ids."""
    received = []
    for step, count in enumerate(rows):
        sent = stream(step, count)
        link.send_stream(sent)
        sent.zero_()
        if step >= ahead:
            received.append(ask(link, rows[step - ahead]))
    return [*received, *(ask(link, count) for count in rows[len(rows) - min(ahead, len(rows)) :])]


def ask(link: StageLink, rows: int) -> list[int]:
    ids = torch.zeros(rows, dtype=torch.int32)
    link.receive_tokens(ids)
    return [int(value) for value in ids]


def middle_stage(link: StageLink, rows: list[int]) -> None:
    for count in rows:
        seen = torch.zeros(count, HIDDEN)
        link.receive_stream(seen)
        link.send_stream(seen.add_(1))


def last_stage(link: StageLink, rows: list[int]) -> None:
    """The ids of a step are the first column of what arrives."""
    for count in rows:
        seen = torch.zeros(count, HIDDEN)
        link.receive_stream(seen)
        link.send_tokens(seen[:, 0].to(torch.int32))
    assert link.take_waited_ns() > 0
    assert link.take_waited_ns() == 0


@settings(max_examples=20)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=STEPS), st.integers(0, 3))
def test_three_stages_of_one_host_pass_on_what_they_compute(rows: list[int], ahead: int) -> None:
    with RankMeeting(HostLayout(1, 3)) as meeting, ThreadPoolExecutor(3) as pool:
        places = [RankPlace(0, 1, stage, 3) for stage in range(3)]
        links = [join_stages(place, meeting.of(place)) for place in places]
        assert links[0] is not None
        assert links[1] is not None
        assert links[2] is not None
        ids = pool.submit(first_stage, links[0], rows, ahead)
        others = [pool.submit(middle_stage, links[1], rows), pool.submit(last_stage, links[2], rows)]
        for other in others:
            other.result(60)
        assert ids.result(60) == [[step + 1 + row * HIDDEN for row in range(count)] for step, count in enumerate(rows)]


@settings(max_examples=20)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=STEPS), st.integers(0, 3))
def test_two_stages_of_different_hosts_exchange_over_streams(rows: list[int], ahead: int) -> None:
    store = HashStore()

    def edge(name: str, index: int) -> StreamEdge:
        return StreamEdge(RankStreams(open_streams(Circle(name, index, 2), store, "lo", 60), index))

    def first() -> list[list[int]]:
        behind = edge("edge-0-1", 0)
        return first_stage(StageLink(None, behind, edge("edge-1-0", 1)), rows, ahead)

    def last() -> None:
        before = edge("edge-0-1", 1)
        last_stage(StageLink(before, None, edge("edge-1-0", 0)), rows)

    with ThreadPoolExecutor(2) as pool:
        ids, other = pool.submit(first), pool.submit(last)
        other.result(60)
        assert ids.result(60) == [[step + row * HIDDEN for row in range(count)] for step, count in enumerate(rows)]


def over_gloo(stage: int, rendezvous: str, rows: list[int], answer: Connection) -> None:
    """What GPUs use, on CPUs: the same calls with another backend."""
    place, meeting = RankPlace(0, 1, stage, 2), Meeting(rendezvous=rendezvous)
    world = join_world(place, meeting)
    assert world is not None
    link = join_stages(place, meeting, replace(world, on_cpus=False))
    assert link is not None
    work: Callable[[], object] = (lambda: first_stage(link, rows, 1)) if stage == 0 else lambda: last_stage(link, rows)
    answer.send(work())
    # Who leaves while its last ids are still on their way resets the connection under the one who waits for them.
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_two_processes_exchange_over_torch_distributed(tmp_path: Path) -> None:
    rows = [1, 7, 3, 40, 2]
    context = SpawnContext()
    ends = [context.Pipe(duplex=False) for _ in range(2)]
    processes = [
        context.Process(target=over_gloo, args=(stage, f"file://{tmp_path / 'store'}", rows, ends[stage][1]))
        for stage in range(2)
    ]
    for process in processes:
        process.start()
    try:
        assert ends[0][0].poll(90), "the first stage answers"
        assert ends[0][0].recv() == [[step + row * HIDDEN for row in range(count)] for step, count in enumerate(rows)]
        for process in processes:
            process.join(30)
        assert [process.exitcode for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()


def test_a_stage_that_was_not_told_where_the_next_one_is_says_so() -> None:
    with pytest.raises(WorkerError, match="rank 0 was not told how it meets rank 1"):
        join_stages(RankPlace(0, 1, 0, 2), Meeting())
