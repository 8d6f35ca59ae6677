"""Tensor-parallel ranks get the rows that are dealt to them and all words, however unevenly both are divided."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from itertools import accumulate, pairwise
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnContext
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed import HashStore

from llmscale._core import RankStreams
from llmscale.errors import WorkerError
from llmscale.models.shard import RankPlace
from llmscale.node.rank_meeting import RankMeeting
from llmscale.parallel.assignment import Meeting
from llmscale.parallel.groups import join_tensor_group, join_world
from llmscale.parallel.layout import HostLayout, row_bounds
from llmscale.parallel.streams import Circle, open_streams
from llmscale.parallel.tensor import Alone, CoreGroup, TensorGroup, TorchGroup

# Fewer rows than ranks, none, as many, and a number that they do not divide.
ROWS = (0, 1, 2, 3, 7, 64)
WIDTHS = (5, 4, 6)
PATIENCE_SECONDS = 60
Joined = Callable[[int, str], AbstractContextManager[list[TensorGroup]]]


def logits(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """All that the ranks hold together; every value differs and bfloat16 holds it exactly."""
    return (torch.arange(rows * columns) % 257 - 128).reshape(rows, columns).to(dtype)


def deal(group: TensorGroup, rows: int, dtype: torch.dtype) -> Tensor:
    """What falls to one rank."""
    widths = WIDTHS[: group.size]
    start, end = list(accumulate(widths, initial=0))[group.rank : group.rank + 2]
    own = logits(rows, sum(widths), dtype)[:, start:end].contiguous()
    bounds = row_bounds(rows, group.size)
    out = torch.full((bounds[group.rank + 1] - bounds[group.rank], sum(widths)), torch.nan, dtype=dtype)
    return group.deal_rows(own, widths, bounds, out).clone()


def gather(group: TensorGroup, parts: Sequence[int]) -> list[int]:
    """The words of all, when this rank has filled its part of a buffer that held others before."""
    bounds = list(accumulate(parts, initial=0))
    words = torch.full((bounds[-1],), 77, dtype=torch.int32)
    words[bounds[group.rank] : bounds[group.rank + 1]] = torch.arange(bounds[group.rank], bounds[group.rank + 1])
    group.gather_words(words, bounds)
    return [int(word) for word in words]


@contextmanager
def in_memory(ranks: int, dtype: str) -> Iterator[list[TensorGroup]]:
    with RankMeeting(HostLayout(ranks)) as meeting:
        places = [RankPlace(rank, ranks) for rank in range(ranks)]
        yield [join_tensor_group(place, meeting.of(place), dtype) for place in places]


@contextmanager
def over_streams(ranks: int, dtype: str) -> Iterator[list[TensorGroup]]:
    store = HashStore()

    def join(rank: int) -> TensorGroup:
        descriptors = open_streams(Circle("stage-0", rank, ranks), store, "lo", PATIENCE_SECONDS)
        return CoreGroup(RankStreams(descriptors, rank, dtype), rank, ranks)

    with ThreadPoolExecutor(ranks) as pool:
        yield list(pool.map(join, range(ranks)))


CORE_GROUPS = pytest.mark.parametrize("joined", [in_memory, over_streams])


@given(st.integers(0, 300), st.integers(1, 64))
def test_rows_are_dealt_whole_evenly_and_from_the_first_rank_on(rows: int, ranks: int) -> None:
    bounds = row_bounds(rows, ranks)
    shares = [end - start for start, end in pairwise(bounds)]
    assert (bounds[0], bounds[-1]) == (0, rows)
    assert max(shares) - min(shares) <= 1
    assert shares[0] == max(shares), "of a single row the first rank, which tells the engine, has it"


@CORE_GROUPS
@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_ranks_get_all_columns_of_their_rows(joined: Joined, ranks: int, dtype: str) -> None:
    with joined(ranks, dtype) as groups, ThreadPoolExecutor(ranks) as pool:
        for rows in ROWS:
            dealt = list(pool.map(deal, groups, [rows] * ranks, [getattr(torch, dtype)] * ranks))
            assert torch.equal(torch.cat(dealt), logits(rows, sum(WIDTHS[:ranks]), getattr(torch, dtype)))


@CORE_GROUPS
@settings(max_examples=10)
@given(st.lists(st.lists(st.integers(0, 50), min_size=3, max_size=3), min_size=1, max_size=5))
def test_ranks_get_the_words_of_all(joined: Joined, exchanges: list[list[int]]) -> None:
    with joined(3, "float32") as groups, ThreadPoolExecutor(3) as pool:
        for parts in exchanges:
            for words in pool.map(gather, groups, [parts] * 3):
                assert words == list(range(sum(parts)))


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_have_the_same_bits_in_memory_and_over_streams_at_every_size(ranks: int, dtype: torch.dtype) -> None:
    """The largest goes in slices that do not divide evenly; random values make the order of additions visible."""
    name = str(dtype).removeprefix("torch.")
    random = torch.Generator().manual_seed(1)
    with (
        in_memory(ranks, name) as near,
        over_streams(ranks, name) as far,
        ThreadPoolExecutor(ranks) as pool,
    ):
        for elements in (0, 1, 577, 70_001):
            parts = [torch.randn(elements, generator=random).to(dtype) for _ in range(ranks)]
            copies = [part.clone() for part in parts]
            sums = [*pool.map(lambda group, part: group.sum(part), near, parts)]
            sums += pool.map(lambda group, part: group.sum(part), far, copies)
            assert all(torch.equal(one, sums[0]) for one in sums)


def test_a_stranger_is_hung_up_on_and_the_ranks_meet_nevertheless() -> None:
    store = HashStore()
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(open_streams, Circle("stage-0", 0, 2), store, "lo", PATIENCE_SECONDS)
        host, port, secret = store.get("llmscale/streams/stage-0/0").decode().split(" ")
        wrong = bytes(byte ^ 1 for byte in bytes.fromhex(secret)) + (1).to_bytes(4, "little")
        for hello in (wrong, b"GET / HTTP/1.1\r\n\r\n", b""):
            with socket.create_connection((host, int(port)), timeout=PATIENCE_SECONDS) as stranger:
                stranger.sendall(hello)
                stranger.shutdown(socket.SHUT_WR)
                assert stranger.recv(1) == b"", "hung up on"
        second = pool.submit(open_streams, Circle("stage-0", 1, 2), store, "lo", PATIENCE_SECONDS)
        found = [first.result(PATIENCE_SECONDS), second.result(PATIENCE_SECONDS)]
    streams = [descriptor for descriptors in found for descriptor in descriptors if descriptor is not None]
    for descriptor in streams:
        os.close(descriptor)
    assert len(streams) == 2, "one to each other"


def test_a_rank_that_does_not_connect_is_named() -> None:
    with pytest.raises(WorkerError, match=r"rank 0 of stage-3 has no stream to ranks \[1, 2\] there: "):
        open_streams(Circle("stage-3", 0, 3), HashStore(), "lo", 0.05)


def test_a_rank_that_is_alone_has_all_rows_and_words_already() -> None:
    own = logits(3, 5, torch.float32)
    assert Alone().deal_rows(own, (5,), (0, 3), torch.empty(0)) is own
    words = torch.arange(4, dtype=torch.int32)
    Alone().gather_words(words, (0, 4))
    assert words.tolist() == [0, 1, 2, 3]


def over_gloo(rank: int, rendezvous: str, answer: Connection) -> None:
    """What GPUs use, on CPUs: the same calls with another backend."""
    world = join_world(RankPlace(rank, 2), Meeting(rendezvous=rendezvous))
    assert world is not None
    group = TorchGroup(world.ranks)
    found = {}
    for rows in ROWS:
        for dtype in (torch.float32, torch.bfloat16):
            found[f"rows/{rows}/{dtype}"] = deal(group, rows, dtype).to(torch.float32).tolist()
    for parts in ((3, 0), (0, 2), (1, 1), (40, 43)):
        found[f"words/{parts}"] = gather(group, parts)
    answer.send(found)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_two_processes_deal_and_gather_over_torch_distributed(tmp_path: Path) -> None:
    context = SpawnContext()
    ends = [context.Pipe(duplex=False) for _ in range(2)]
    processes = [
        context.Process(target=over_gloo, args=(rank, f"file://{tmp_path / 'store'}", ends[rank][1]))
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    try:
        assert all(receiver.poll(90) for receiver, _ in ends), "both ranks answer"
        first, second = (receiver.recv() for receiver, _ in ends)
        for process in processes:
            process.join(30)
        assert [process.exitcode for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    for case, found in first.items():
        kind, what, *_ = case.split("/")
        if kind == "rows":
            assert found + second[case] == logits(int(what), sum(WIDTHS[:2]), torch.float32).tolist(), case
        else:
            assert found == second[case] == list(range(len(found))), case
