"""Steps on a device apart: one transfer in, a captured graph or eager work, a sampler there, ids back at one event.

A step is launched before the one in front of it is read back, where the device itself can put what that one samples
in the place of its ids; results of two steps arrive in memory of their own.

Steps in which every row is a decode are replays of a graph for the next larger of a few batch sizes; the rows that fill
it up belong to no sequence, so they write nothing that anybody reads. All others run eagerly. A step that finds no
memory is cut into halves of its rows, which are computed one after the other: keys and values of the first are there
for the second. Rows that the device's sampler has no columns for are sampled on the processor from a copy of their
logits. Per step: one call of the core to pack, three of a stream, one to read ids. It does not know who plans.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmscale._core import CpuKernels, PackedStep, StepCounts
from llmscale.devices.interface import Accelerator, DeviceSampler, Event, Graph
from llmscale.errors import OutOfDeviceMemory
from llmscale.parallel.layout import row_bounds
from llmscale.parallel.tensor import TensorGroup
from llmscale.worker.step import Executor, StepLimits
from llmscale.worker.step_memory import STAGES, DeviceStep, StepMemory, memory_of
from llmscale.worker.steps import Memory, StepSource

Span = tuple[int, int]


def graph_sizes(max_sequences: int, max_graphs: int) -> list[int]:
    """Batch sizes that steps of decodes are captured for: 1, 2, 4, then by eights, and the largest; ascending.

    Padding costs at most seven rows, which decoding, bound by its weights' bytes, does not notice. Where that would be
    more graphs than there may be, the step between sizes grows.
    """
    if max_graphs == 0:
        return []
    small = [size for size in (1, 2, 4) if size < max_sequences]
    stride = 8
    while len(small) + -(-max_sequences // stride) > max_graphs and stride < max_sequences:
        stride *= 2
    return [*small, *range(stride, max_sequences, stride), max_sequences]


@dataclass(slots=True)
class _Part:
    """Rows of the step that have been launched, and where their results arrive."""

    samples: Span
    arrived: Event | None
    """None once they are taken out of the memory that they arrive in"""
    drawn: Tensor | None
    """int32, what the device's sampler left"""
    logits: Tensor | None
    """for the processor's sampler"""


class DeviceStepper:
    """Owns what steps of one worker need on a device: memory, graphs, sampler."""

    def __init__(
        self,
        accelerator: Accelerator,
        executor: Executor,
        memory: StepMemory,
        limits: StepLimits,
        sampler: DeviceSampler | None,
        group: TensorGroup,
        *,
        is_alone: bool,
    ) -> None:
        """`sampler` is None on a rank that does not sample. Of a rank that `is_alone` nobody else waits for a step."""
        self.accelerator = accelerator
        self.memory = memory
        self.group = group
        self.is_alone = is_alone
        self._executor = executor
        self._limits = limits
        self.sampler = sampler
        entries = 0 if sampler is None else sampler.drawn.numel()
        self._drawn = [accelerator.pinned(entries, torch.int32) for _ in range(STAGES)] if entries > 0 else []
        self._turn = 0
        self._graphs: dict[int, Graph] = {}
        self._logits_here: Tensor | None = None
        self._logits_there: Tensor | None = None

    def capture_graphs(self) -> int:
        """Captures decode steps of all sizes, the largest first, so that the others fit what it has taken. Returns how
        many there are."""
        for size in reversed(graph_sizes(self._limits.max_sequences, self.accelerator.max_graphs)):
            room = (size, size)
            step = self.memory.step(room, size, (0, size))

            def work(step: DeviceStep = step) -> None:
                self.forward(step)

            stream = self.accelerator.compute
            stream.run(lambda room=room: self.memory.clear(room))  # type: ignore[misc]  # mypy infers no lambda defaults
            stream.run(work)
            stream.record().wait()
            self._graphs[size] = self.accelerator.capture(work)
        return len(self._graphs)

    def graph_for(self, rows: int) -> int | None:
        """The smallest size that has a graph and room for so many decodes."""
        return min((size for size in self._graphs if size >= rows), default=None)

    def replay(self, size: int) -> None:
        """Runs a captured step."""
        self.accelerator.compute.run(self._graphs[size])

    def forward(self, step: DeviceStep) -> None:
        """The whole of a step, for a stream or a graph."""
        logits = self._logits(step)
        if self.sampler is not None and logits.shape[0] > 0:
            self.sampler.sample(logits, step.sampling)

    def _logits(self, step: DeviceStep) -> Tensor:
        if self.sampler is not None:
            self.sampler.hand_on(step.drawn_from, step.inputs.token_ids)
        return self._executor.forward(step.inputs)

    def forward_for_host(self, step: DeviceStep, rows: int) -> Tensor:
        """Begins a step of which `rows` rows of logits go to the host, and returns where they arrive."""
        if self._logits_there is None or self._logits_here is None:
            self._make_logits(step)
        there, here = self._logits_there, self._logits_here
        assert there is not None, "just made"
        assert here is not None, "just made"
        stream = self.accelerator.compute
        stream.run(lambda: there[:rows].copy_(self._logits(step)[:rows]))
        stream.copy(there[:rows], here[:rows])
        return here[:rows]

    def _make_logits(self, step: DeviceStep) -> None:
        """Made when it is first needed: most workers never do."""
        dtype, width = self._executor.logits_dtype, self._executor.logits_width
        most = self._limits.max_sequences
        device = step.inputs.token_ids.device
        # Not zeros, which another stream would write.
        self._logits_there = torch.empty(most, width, dtype=dtype, device=device)
        self._logits_here = self.accelerator.pinned(most * width, dtype).view(most, width)

    def fetch_drawn(self, *, wants_logprobs: bool) -> Tensor:
        """Brings back what the sampler left: ids and their log probabilities, or with the most likely others all.
        Where it arrives it stays until the step after the next brings its own back."""
        assert self.sampler is not None, "a rank that samples has a sampler"
        entries = self.sampler.drawn.numel() if wants_logprobs else 3 * self.sampler.max_rows
        self._turn = (self._turn + 1) % STAGES
        here = self._drawn[self._turn][:entries]
        self.accelerator.compute.copy(self.sampler.drawn[:entries], here)
        return here


class DeviceSteps:
    """See `Steps`."""

    def __init__(
        self, stepper: DeviceStepper, source: StepSource, kernels: CpuKernels, dtype: str, max_ahead: int
    ) -> None:
        assert max_ahead < STAGES, f"results of {max_ahead + 1} steps have memory of their own"
        self._stepper = stepper
        self._source = source
        self._kernels = kernels
        self._dtype = dtype
        self._max_ahead = max_ahead
        self._starts = memoryview(source.buffer("query_start"))
        """The row at which each of the mirror's sequences begins, and the end."""
        self._begun: deque[list[_Part]] = deque()
        """By step, the oldest first."""

    @property
    def ahead(self) -> int:
        """See `Steps`. None where the processor samples, which reads the mirror, nor of a step that was cut."""
        newest = self._begun[-1] if self._begun else []
        return self._max_ahead if len(newest) == 1 and newest[0].logits is None else 0

    @property
    def is_done(self) -> bool:
        """See `Steps`."""
        return all(part.arrived is None or part.arrived.is_done for parts in list(self._begun)[:1] for part in parts)

    def compute(self, counts: StepCounts) -> bool:
        """See `Steps`. Raises OutOfDeviceMemory if a single row finds no memory twice, or one of several ranks none."""
        stepper = self._stepper
        is_first = not self._begun
        if not is_first and not self._source.follows_on():
            return False
        parts: list[_Part] = []
        ahead: deque[Span] = deque([(0, counts.rows)] if counts.rows > 0 else [])
        refused: Span | None = None
        while ahead:
            rows = ahead.popleft()
            try:
                part = self._launch(rows, counts)
            except stepper.accelerator.out_of_memory as error:
                if not is_first:
                    # What the step in front has sampled lies where the first half would sample.
                    stepper.accelerator.empty_cache()
                    return False
                if not stepper.is_alone or rows == refused:
                    raise _no_memory(rows, error) from error
                refused = rows
                ahead.extendleft(reversed(_halves(rows)))
                stepper.accelerator.empty_cache()
                continue
            if ahead or parts:
                # There may be more parts than memory for their results.
                _keep(part)
            parts.append(part)
        self._begun.append(parts)
        return True

    def draw(self, row_bounds: Sequence[int], rank: int, words: Memory) -> list[int]:
        """See `Steps`."""
        stepper, source = self._stepper, self._source
        for part in self._begun.popleft():
            if part.arrived is not None:
                part.arrived.wait()
            if part.drawn is not None:
                assert stepper.sampler is not None, "something was drawn"
                source.take_drawn(part.samples, memory_of(part.drawn), stepper.sampler.max_rows, words)
            elif part.logits is not None:
                source.draw(self._kernels, memory_of(part.logits), self._dtype, part.samples, 0, words)
        return source.word_parts(row_bounds)

    def forget(self) -> None:
        """See `Steps`. What still runs is behind nobody: results that nobody reads arrive before any later ones."""
        self._begun.clear()

    def _launch(self, rows: Span, counts: StepCounts) -> _Part:
        """Starts some rows of the step, and the way back of what they give."""
        stepper, count = self._stepper, rows[1] - rows[0]
        is_decodes = counts.decodes == counts.rows == counts.samples
        size = stepper.graph_for(count) if is_decodes else None
        room = (count, self._sequences_among(rows, counts)) if size is None else (size, size)
        stage = stepper.memory.stage()
        packed = self._source.pack_step(rows, room, memory_of(stage.packed), memory_of(stage.changes))
        stepper.memory.send(stage, packed, stepper.accelerator.compute)
        own = _own_rows(packed, stepper.group)
        if stepper.sampler is None or own[0] == own[1]:
            self._run(room, packed, (0, 0), size)
            return _Part(own, stepper.accelerator.compute.record(), None, None)
        first = packed.first_sample
        dealt = (own[0] - first, own[1] - first)
        logits: Tensor | None = None
        drawn: Tensor | None = None
        if packed.changes is None:
            step = stepper.memory.step(room, packed.last_sample - first, dealt)
            logits = stepper.forward_for_host(step, own[1] - own[0])
        else:
            self._run(room, packed, dealt, size)
            drawn = stepper.fetch_drawn(wants_logprobs=packed.wants_logprobs)
        return _Part(own, stepper.accelerator.compute.record(), drawn, logits)

    def _sequences_among(self, rows: Span, counts: StepCounts) -> int:
        """How many sequences have rows there. Exact, because operations take a step of as many rows as sequences for
        one without chunks; a part of a step that was cut has fewer of both."""
        starts = self._starts[: counts.sequences + 1]
        return bisect_left(starts, rows[1]) - bisect_right(starts, rows[0]) + 1

    def _run(self, room: Span, packed: PackedStep, dealt: Span, size: int | None) -> None:
        stepper = self._stepper
        if size is not None:
            stepper.replay(size)
            return
        step = stepper.memory.step(room, packed.last_sample - packed.first_sample, dealt)
        stepper.accelerator.compute.run(lambda: stepper.forward(step))


def _own_rows(packed: PackedStep, group: TensorGroup) -> Span:
    """The sampling rows among those packed that are dealt to this rank."""
    if group.size == 1:
        return packed.first_sample, packed.last_sample
    bounds = row_bounds(packed.last_sample - packed.first_sample, group.size)
    return packed.first_sample + bounds[group.rank], packed.first_sample + bounds[group.rank + 1]


def _halves(rows: Span) -> list[Span]:
    """A single row is tried again as it is, now that the cache is empty."""
    first, last = rows
    middle = (first + last) // 2
    return [rows] if last - first == 1 else [(first, middle), (middle, last)]


def _no_memory(rows: Span, error: BaseException) -> OutOfDeviceMemory:
    return OutOfDeviceMemory(
        f"a step of {rows[1] - rows[0]} rows finds no memory on the device: {error}. Lower --kv-cache-bytes or"
        " --max-num-batched-tokens, or use more tensor-parallel ranks."
    )


def _keep(part: _Part) -> None:
    """Takes results out of the memory that they arrive in."""
    if part.arrived is not None:
        part.arrived.wait()
    part.arrived = None
    part.drawn = None if part.drawn is None else part.drawn.clone()
    part.logits = None if part.logits is None else part.logits.clone()
