"""A device that is none: CPU tensors, streams that do their work late and in any order that events allow, and rules.

Work waits in its stream until somebody waits for an event; then streams go on one piece at a time, drawn by a seed, and
with `lazy` those that nobody waits for come last. Pinned memory is known; a transfer from other memory, or from memory
that is written before the transfer was made, fails. What a transfer will fill holds garbage until then. Memory and its
ends are scripted. A broken rule raises `BrokenRule` where it is found.
"""

from __future__ import annotations

import random
import zlib
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

GARBAGE = 0x5B
PIECE_NS = 1_000
PATIENCE = 20
"""How often one has to ask a lazy device until it is done."""


class BrokenRule(AssertionError):
    """Something that a real device would answer with wrong results, or not at all."""


class FakeOutOfMemory(RuntimeError):
    """As torch's."""


@dataclass(slots=True)
class Script:
    """What a test wants of the machine; it outlives the devices that are opened."""

    seed: int = 0
    lazy: bool = True
    """Streams go on only as far as somebody waits."""
    prompt: bool = False
    """Work is done as soon as it can be, as for ranks that wait for what each other's devices do."""
    favourite: int = 0
    """The stream that is mostly ahead where nothing holds it back: 0 computes, 1 offloads, 2 restores."""
    free_bytes: int = 1 << 30
    total_bytes: int = 2 << 30
    step_bytes: int = 1 << 20
    refused_runs: set[int] = field(default_factory=set)
    """Which pieces of work of the compute stream find no memory, counted from when `runs` was set to 0."""
    runs: int = 0
    max_graphs: int = 64
    triton: bool = False
    """Operations and sampler are those of CUDA devices, which Triton's interpreter runs."""
    strict: bool = True
    """Captured work may not allocate."""
    broken: list[str] = field(default_factory=list)
    empties: int = 0
    calibrated: list[tuple[int, int]] = field(default_factory=list)
    """Bytes of a block and the time that there was, of every calibration of copies."""


SCRIPT = Script()


class FakeEvent:
    """See `Event`."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._asked = 0
        self.at_ns: int | None = None

    def wait(self) -> None:
        self._machine.go_on_until(self)

    @property
    def is_done(self) -> bool:
        self._machine.wander()
        self._asked += 1
        if self._asked > PATIENCE:
            # A device goes on by itself in the end, however lazy.
            self._machine.go_on_until(self)
        return self.at_ns is not None

    def elapsed_ns_since(self, earlier: FakeEvent) -> int:
        assert self.at_ns is not None
        assert earlier.at_ns is not None
        return self.at_ns - earlier.at_ns


@dataclass(slots=True)
class _Piece:
    """Of a stream: something to do, or an event to wait for."""

    work: Callable[[], object] | None = None
    after: FakeEvent | None = None


class Machine:
    """All streams of one device."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.now_ns = 0
        self.queues: list[deque[_Piece]] = []
        self._random = random.Random(script.seed)
        self._pinned: list[tuple[int, int]] = []
        self.recording: object | None = None
        self._busy = False

    def pin(self, address: int, size_bytes: int) -> None:
        self._pinned.append((address, address + size_bytes))

    def is_pinned(self, tensor: Tensor) -> bool:
        first = tensor.data_ptr()
        last = (
            first + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True)) * tensor.itemsize
        )
        return any(start <= first and last + tensor.itemsize <= end for start, end in self._pinned)

    def submit(self, queue: deque[_Piece], work: Callable[[], object]) -> None:
        if self.recording is not None:
            raise self.broken("a stream is used while a graph is recorded")
        queue.append(_Piece(work=work))
        self.wander()

    def wander(self) -> None:
        """Lets the device go on a little by itself."""
        if self._busy:
            return
        if self.script.prompt:
            self.drain()
            return
        if self.script.lazy:
            return
        for _ in range(self._random.randrange(4)):
            if not self._step(self._ready()):
                return

    def go_on_until(self, event: FakeEvent) -> None:
        while event.at_ns is None:
            if not self._step(self._ready()):
                raise self.broken("an event is waited for that no stream comes to")

    def drain(self) -> None:
        while self._step(self._ready()):
            pass

    def broken(self, why: str) -> BrokenRule:
        self.script.broken.append(why)
        return BrokenRule(why)

    def _ready(self) -> list[deque[_Piece]]:
        return [
            queue for queue in self.queues if queue and (queue[0].after is None or queue[0].after.at_ns is not None)
        ]

    def _step(self, ready: list[deque[_Piece]]) -> bool:
        if not ready:
            return False
        ahead = self.queues[self.script.favourite]
        hurries = any(queue is ahead for queue in ready) and self._random.random() < 0.9
        queue = ahead if hurries else self._random.choice(ready)
        piece = queue.popleft()
        self.now_ns += PIECE_NS
        if piece.work is not None:
            self._busy = True
            try:
                piece.work()
            finally:
                self._busy = False
        return True


def checksum(tensor: Tensor) -> int:
    return zlib.crc32(tensor.contiguous().view(torch.uint8).numpy().tobytes())


class FakeStream:
    """See `Stream`."""

    def __init__(self, machine: Machine, *, computes: bool = False) -> None:
        self._machine = machine
        self._queue: deque[_Piece] = deque()
        self._computes = computes
        machine.queues.append(self._queue)

    def run(self, work: Callable[[], object]) -> None:
        machine, script = self._machine, self._machine.script
        if self._computes:
            script.runs += 1
            if script.runs - 1 in script.refused_runs:
                raise FakeOutOfMemory(f"run {script.runs - 1} finds no memory")
        machine.submit(self._queue, work)

    def copy(self, source: Tensor, target: Tensor) -> None:
        machine = self._machine
        if source.shape != target.shape or source.dtype != target.dtype:
            raise machine.broken(f"{source.shape} {source.dtype} is copied to {target.shape} {target.dtype}")
        self._check_sides(source, target)
        before = checksum(source) if machine.is_pinned(source) else None
        if machine.is_pinned(target):
            target.view(torch.uint8).fill_(GARBAGE)

        def transfer() -> None:
            if before is not None and checksum(source) != before:
                raise machine.broken("pinned memory was written before its transfer was made")
            target.copy_(source)

        machine.submit(self._queue, transfer)

    def copy_blocks(self, source: Tensor, target: Tensor, pairs: Sequence[tuple[int, int]]) -> None:
        machine = self._machine
        self._check_sides(source, target)
        if len({pair[1] for pair in pairs}) != len(pairs):
            raise machine.broken("a block is written twice")
        from_host = machine.is_pinned(source)

        def one(there: int, here: int) -> Callable[[], None]:
            before = checksum(source[there]) if from_host else None

            def transfer() -> None:
                if before is not None and checksum(source[there]) != before:
                    raise machine.broken("a host block was written before it was copied back")
                target[here].copy_(source[there])

            return transfer

        for there, here in pairs:
            machine.submit(self._queue, one(there, here))

    def record(self) -> FakeEvent:
        event = FakeEvent(self._machine)

        def reach() -> None:
            event.at_ns = self._machine.now_ns

        self._machine.submit(self._queue, reach)
        return event

    def wait_for(self, event: FakeEvent) -> None:
        self._queue.append(_Piece(after=event))

    def _check_sides(self, source: Tensor, target: Tensor) -> None:
        if self._machine.is_pinned(source) == self._machine.is_pinned(target):
            raise self._machine.broken("a transfer is between pinned and device memory, and of these two one is not")
