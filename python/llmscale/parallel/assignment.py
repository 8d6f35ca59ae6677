"""What a worker process is told to be: one line of JSON on its standard input.

It names the engine's link, the incarnation, the rank's place in its replica and where the ranks meet. Pure data with
bounds, written by nodes and read by workers; it knows neither, and no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import BinaryIO

import msgspec

from llmscale.errors import WorkerError
from llmscale.models.shard import RankPlace

MAX_ASSIGNMENT_BYTES = 4_096
ROOM_BYTES = 1 << 20
"""Room for one rank's part in shared memory: larger tensors go in pieces, and 1 MiB stays in the second-level cache."""
WORKER_EXECUTORS = ("native", "torch")
"""What a worker may be: "auto" of the settings has been decided by then."""


@dataclass(frozen=True, slots=True)
class Meeting:
    """Where ranks of one epoch meet."""

    memory: str | None = None
    """File of `RankMemory.bytes_for(tensor_size, ROOM_BYTES)` zeros, one per stage; None for one rank per stage, and
    for a stage on several hosts."""
    before: str | None = None
    """File of `RankChannel.BYTES` zeros that brings the residual stream from the stage before; None for the first, and
    where that stage is elsewhere."""
    behind: str | None = None
    """The same, to the stage behind; None for the last."""
    samples: str | None = None
    """The same, with sampled ids from the last stage to the first; None for those between."""
    rendezvous: str | None = None
    """For whom the files above are not: where torch.distributed meets, tcp://HOST:PORT, or file://PATH on one host."""
    max_wait_seconds: float = 60.0
    """For meeting."""
    max_exchange_seconds: float = 180.0
    """For what another rank sends in a step: longer than it may take to compute it."""


@dataclass(frozen=True, slots=True)
class DiskPlace:
    """One rank's part of the disk tier."""

    path: str
    """Its file."""
    content: str
    """What its blocks are of, beside numerics and layout: weights and what became of them."""


class Assignment(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which engine to serve, as which incarnation and rank."""

    link: str
    epoch: int
    place: RankPlace = RankPlace()
    meeting: Meeting = Meeting()
    model_folder: str | None = None
    """Where the model lies on this host, if not where the engine's host has it."""
    quantization: str | None = None
    """What dense weights become while they are loaded."""
    kv_dtype: str = "auto"
    """What keys and values are kept as; auto: as the activations."""
    key_file: str | None = None
    """The fleet's node key, for an engine on another host."""
    host_memory: str | None = None
    """File of this rank's part of the host tier, kept from worker to worker; None for memory of its own."""
    disk: DiskPlace | None = None
    """This rank's file of the disk tier; None without one."""
    share: tuple[int, int] = (0, 1)
    """Which part of this host's CPUs is this rank's, and of how many."""
    device: str = "cpu"
    """On what it computes."""
    device_index: int = 0
    """Which of this host's."""
    executor: str = "torch"
    """What computes its steps, one of `WORKER_EXECUTORS`."""

    @property
    def who(self) -> str:
        """The rank's name before its last words; nothing for a worker that is alone."""
        return "" if self.place.ranks == 1 else f"rank {self.place.rank}: "


def write_assignment(assignment: Assignment) -> bytes:
    """The line that `read_assignment` reads."""
    line = msgspec.json.encode(assignment) + b"\n"
    assert len(line) <= MAX_ASSIGNMENT_BYTES, f"an assignment has {len(line)} bytes"
    return line


def read_assignment(source: BinaryIO) -> Assignment | None:
    """Waits for one line. None: the node closed the pipe, this process is not needed. Raises WorkerError."""
    line = source.readline(MAX_ASSIGNMENT_BYTES)
    if not line:
        return None
    try:
        return msgspec.json.decode(line, type=Assignment)
    except msgspec.DecodeError as error:
        raise WorkerError(f"a worker is started by a node, which tells it its link and epoch; got {line!r}") from error
