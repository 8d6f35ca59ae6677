"""How the ranks of one replica find each other, and the groups that come of it.

Ranks of one host meet in shared memory. Those of several hosts meet at a store of torch.distributed, and go on over TCP
streams of their own on CPUs, over torch.distributed on GPUs. Every wait has a deadline: a rank that does not come ends
the group, never hangs it. It does not know models beyond the number format, or who starts processes.
"""

from __future__ import annotations

import datetime
import socket
import time
from dataclasses import dataclass

import torch.distributed
from torch._C._distributed_c10d import FileStore, Store, TCPStore

from llmscale._core import RankChannel, RankMemory, RankStreams
from llmscale.errors import WorkerError
from llmscale.models.shard import RankPlace
from llmscale.parallel.assignment import ROOM_BYTES, Meeting
from llmscale.parallel.pipeline import ChannelEdge, Edge, StageLink, StreamEdge, TorchEdge
from llmscale.parallel.streams import Circle, open_streams
from llmscale.parallel.tensor import Alone, CoreGroup, TensorGroup, TorchGroup

BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}
"""By the device that computes; ids and counts stay on the CPU."""

RETRY_SECONDS = 0.005
MAX_LOADING_SECONDS = 3_600.0
"""By how much one rank may have its weights later than another: hosts read them at their own speed, a hundred gigabytes
over a network in minutes. Who dies meanwhile is seen by its node, which ends the others."""


@dataclass(frozen=True, slots=True)
class World:
    """The process groups of a replica on several hosts."""

    ranks: torch.distributed.ProcessGroup
    """All of them."""
    stage: torch.distributed.ProcessGroup | None
    """Those that share this rank's layers; None where a stage is one rank, and on CPUs."""
    store: Store
    """Where they have met."""
    interface: str
    """On which they can be reached."""
    on_cpus: bool

    def least(self, count: int) -> int:
        """The smallest count of all ranks, which all call this once, when their weights are there. Raises WorkerError.

        Told by way of the store, because an operation of the group has the deadline of a step.
        """
        own = self.ranks.rank()
        keys = [f"llmscale/count/{rank}" for rank in range(self.ranks.size())]
        try:
            self.store.set(keys[own], str(count))
            self.store.wait(keys, datetime.timedelta(seconds=MAX_LOADING_SECONDS))
            return min(int(self.store.get(key)) for key in keys)
        except RuntimeError as error:
            raise WorkerError(f"rank {own} was not told what the others have room for: {error}") from error


def join_world(place: RankPlace, meeting: Meeting, interface: str = "lo", device: str = "cpu") -> World | None:
    """All ranks of the replica, at a rendezvous; None where the meeting names none. Raises WorkerError.

    `interface` is how ranks of other hosts reach this one. Called once in a process, before the other two; all three
    before weights are read: hosts read them at their own speed, and the deadline is for meeting alone. Rank 0 makes the
    store.
    """
    if meeting.rendezvous is None:
        return None
    wait = datetime.timedelta(seconds=meeting.max_wait_seconds)
    # On CPUs the group only meets; on devices it is what ranks exchange tensors over in steps.
    exchange = wait if device == "cpu" else datetime.timedelta(seconds=meeting.max_exchange_seconds)
    try:
        scheme, _, address = meeting.rendezvous.partition("://")
        store = _store(address, place, wait) if scheme == "tcp" else FileStore(address, place.ranks)
        torch.distributed.init_process_group(
            BACKENDS[device], store=store, rank=place.rank, world_size=place.ranks, timeout=exchange
        )
    except (RuntimeError, ValueError, OSError) as error:
        raise WorkerError(f"rank {place.rank} of {place.ranks} did not meet the others: {error}") from error
    ranks = torch.distributed.group.WORLD
    assert ranks is not None, "the default group was just made"
    on_cpus = device == "cpu"
    stage = None if on_cpus or place.tensor_size == 1 else _stage_group(place, exchange)
    return World(ranks, stage, store, interface, on_cpus)


def _store(address: str, place: RankPlace, wait: datetime.timedelta) -> Store:
    """The store at HOST:PORT. By itself torch listens on every interface; here it does on that one alone."""
    host, _, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    listening: int | None = None
    if place.rank == 0:
        family, _, _, _, where = socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)[0]
        with socket.create_server(where[:2], family=family, backlog=place.ranks) as server:
            listening = server.detach()
    else:
        _wait_for_listener(host, int(port), wait)
    return TCPStore(
        host,
        int(port),
        place.ranks,
        is_master=listening is not None,
        timeout=wait,
        wait_for_workers=False,
        master_listen_fd=listening,
    )


def _wait_for_listener(host: str, port: int, wait: datetime.timedelta) -> None:
    """Torch looks again after a whole second when rank 0 is not there yet, which was most of a stream's pause."""
    deadline = time.monotonic() + wait.total_seconds()
    while True:
        try:
            probe = socket.create_connection((host, port), timeout=max(RETRY_SECONDS, deadline - time.monotonic()))
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(RETRY_SECONDS)
        else:
            probe.close()
            return


def join_tensor_group(place: RankPlace, meeting: Meeting, dtype: str, world: World | None = None) -> TensorGroup:
    """The ranks that share this one's layers. Raises WorkerError."""
    if place.tensor_size == 1:
        return Alone()
    max_wait_us = int(meeting.max_exchange_seconds * 1e6)
    if meeting.memory is not None:
        memory = RankMemory(
            meeting.memory, place.tensor_rank, place.tensor_size, ROOM_BYTES, dtype, max_wait_us=max_wait_us
        )
        return CoreGroup(memory, place.tensor_rank, place.tensor_size)
    if world is None:
        raise WorkerError(
            f"rank {place.rank} shares its layers with {place.tensor_size - 1} others and was not told where"
        )
    if world.stage is not None:
        return TorchGroup(world.stage)
    circle = Circle(f"stage-{place.stage}", place.tensor_rank, place.tensor_size)
    descriptors = open_streams(circle, world.store, world.interface, meeting.max_wait_seconds)
    streams = RankStreams(descriptors, circle.index, dtype, max_wait_us=max_wait_us)
    return CoreGroup(streams, place.tensor_rank, place.tensor_size)


def _stage_group(place: RankPlace, wait: datetime.timedelta) -> torch.distributed.ProcessGroup:
    """Every rank makes the groups of all stages, as torch wants it, and keeps its own."""
    own: torch.distributed.ProcessGroup | None = None
    for stage in range(place.stages):
        ranks = list(range(stage * place.tensor_size, (stage + 1) * place.tensor_size))
        try:
            made = torch.distributed.new_group(ranks, timeout=wait)
        except RuntimeError as error:
            raise WorkerError(f"rank {place.rank} did not meet the others of its stage: {error}") from error
        if isinstance(made, torch.distributed.ProcessGroup):
            assert stage == place.stage, (stage, place)
            own = made
    assert own is not None, "every rank is of a stage"
    return own


def join_stages(place: RankPlace, meeting: Meeting, world: World | None = None) -> StageLink | None:
    """The stages before and behind this one; None for a replica of one stage. Raises WorkerError."""
    if place.stages == 1:
        return None
    max_wait_us = int(meeting.max_exchange_seconds * 1e6)

    def edge(path: str | None, sender: int, receiver: int) -> Edge:
        peer = receiver if place.rank == sender else sender
        if path is not None:
            return ChannelEdge(RankChannel(path, peer, max_wait_us=max_wait_us))
        if world is None:
            raise WorkerError(f"rank {place.rank} was not told how it meets rank {peer}")
        if not world.on_cpus:
            # A step in flight takes one send of each rank; more can only be those whose end was not looked at yet.
            return TorchEdge(world.ranks, peer, max_sends=place.stages)
        circle = Circle(f"edge-{sender}-{receiver}", int(place.rank == receiver), 2)
        descriptors = open_streams(circle, world.store, world.interface, meeting.max_wait_seconds)
        return StreamEdge(RankStreams(descriptors, circle.index, max_wait_us=max_wait_us))

    first, last = place.tensor_rank, (place.stages - 1) * place.tensor_size + place.tensor_rank
    # In this order everywhere: who waits for the next stage has been met by the one before.
    before = None if place.is_first_stage else edge(meeting.before, place.rank - place.tensor_size, place.rank)
    behind = None if place.is_last_stage else edge(meeting.behind, place.rank, place.rank + place.tensor_size)
    samples = None
    if place.is_first_stage or place.is_last_stage:
        samples = edge(meeting.samples, last, first)
    return StageLink(before, behind, samples)
