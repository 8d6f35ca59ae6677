"""Steps that torch computes on the processor, where the mirror's buffers, the logits and the sampler are.

Nothing is copied; a step costs eight slices and two calls here. It does not know where steps come from, and completes
none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from llmscale._core import CpuKernels, StepCounts
from llmscale.worker.step import StepInputs
from llmscale.worker.steps import Memory, StepSource


class Forward(Protocol):
    """What runs a step on the processor."""

    kernels: CpuKernels
    dtype: str

    def forward(self, step: StepInputs) -> Memory:
        """The step's logits, valid until the next call."""


class StepBuffers:
    """The mirror's buffers, wrapped once."""

    def __init__(self, source: StepSource) -> None:
        def wrap(name: str) -> Tensor:
            return torch.frombuffer(source.buffer(name), dtype=torch.int32)

        self._token_ids = wrap("token_ids")
        self._positions = wrap("positions")
        self._slot_mapping = wrap("slot_mapping")
        self._query_start = wrap("query_start")
        self._sequence_lengths = wrap("sequence_lengths")
        self._table_offsets = wrap("table_offsets")
        self._block_tables = wrap("block_tables")
        self._sample_rows = wrap("sample_rows")

    def inputs(self, counts: StepCounts) -> StepInputs:
        """Views of what the current step uses."""
        rows, sequences, samples = counts.rows, counts.sequences, counts.samples
        return StepInputs(
            rows=rows,
            sequences=sequences,
            samples=samples,
            token_ids=self._token_ids[:rows],
            positions=self._positions[:rows],
            slot_mapping=self._slot_mapping[:rows],
            query_start=self._query_start[: sequences + 1],
            sequence_lengths=self._sequence_lengths[:sequences],
            table_offsets=self._table_offsets[:sequences],
            block_tables=self._block_tables,
            sample_rows=self._sample_rows[:samples],
        )


class HostSteps:
    """See `Steps`; done when a call returns."""

    ahead = 0
    is_done = True

    def __init__(self, runner: Forward, source: StepSource) -> None:
        self._runner = runner
        self._source = source
        self._buffers = StepBuffers(source)
        self._logits: Memory = (0, 0)

    def compute(self, counts: StepCounts) -> bool:
        """See `Steps`."""
        self._logits = self._runner.forward(self._buffers.inputs(counts))
        return True

    def draw(self, row_bounds: Sequence[int], rank: int, words: Memory) -> list[int]:
        """See `Steps`."""
        runner = self._runner
        return self._source.draw(runner.kernels, self._logits, runner.dtype, row_bounds, rank, words)

    def forget(self) -> None:
        """See `Steps`."""
