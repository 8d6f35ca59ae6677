"""Whole steps of one source, on whatever device: compute what the mirror holds, then draw for the rows that sample.

Only what steps are to a worker stands here, without torch: `host_steps.py` computes them with torch on the processor,
`device_steps.py` on devices apart, `native_runner.py` with the native executor. It does not know where steps come from.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from llmscale._core import CpuKernels, Int32Buffer, NativeProgram, PackedStep, StepCounts

Memory = tuple[int, int]
"""Address and number of elements of contiguous memory."""


class StepSource(Protocol):
    """Whoever owns a mirror: a worker's session or a local replica. See `llmscale._core.WorkerSession`."""

    def buffer(self, name: str) -> Int32Buffer: ...
    def draw(
        self, kernels: CpuKernels, logits: Memory, dtype: str, row_bounds: Sequence[int], rank: int, words: Memory
    ) -> list[int]: ...
    def compute(self, kernels: CpuKernels, program: NativeProgram, counts: StepCounts) -> None: ...
    def pack_step(self, rows: tuple[int, int], room: tuple[int, int], out: Memory, changes: Memory) -> PackedStep: ...
    def follows_on(self) -> bool: ...
    def take_drawn(self, rows: tuple[int, int], sampled: Memory, max_rows: int, words: Memory) -> None: ...
    def word_parts(self, row_bounds: Sequence[int]) -> list[int]: ...


class Steps(Protocol):
    """The steps of one source, one after the other."""

    def compute(self, counts: StepCounts) -> bool:
        """Computes the step whose rows are in the mirror, or begins to. False: it needs what the step in front of it
        samples, which has to be drawn and told first; nothing was begun."""

    @property
    def ahead(self) -> int:
        """How many steps need not be drawn yet, that computed last included."""

    @property
    def is_done(self) -> bool:
        """Whether drawing for the oldest step that is computed and not drawn for waits for nothing."""

    def draw(self, row_bounds: Sequence[int], rank: int, words: Memory) -> list[int]:
        """Draws for sampling rows `row_bounds[rank]` to `row_bounds[rank + 1]` of that step: fills their part of
        `words` and returns where each rank's begins, and the last ends."""

    def forget(self) -> None:
        """Nobody will draw for what was computed so far."""
