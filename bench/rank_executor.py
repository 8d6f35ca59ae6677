"""One rank's executor for measurements: decoding steps of a fixed shape, with or without the other ranks.

Without them sums and deals are left out: the same work on numbers that mean nothing. O(1) beyond the model.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from llmscale._core import CpuKernels
from llmscale.layers.native import NativeOps
from llmscale.models.loader import LoadOptions, load_weights
from llmscale.models.registry import describe_model
from llmscale.models.shard import RankPlace, shard_model
from llmscale.parallel.assignment import Meeting
from llmscale.parallel.groups import join_tensor_group
from llmscale.parallel.tensor import TensorGroup
from llmscale.worker.executor_torch import Ranks, TorchExecutor
from llmscale.worker.kv_region import KvRegion, kv_layout
from llmscale.worker.step import StepInputs, StepLimits

BLOCK_TOKENS = 32
MAX_BATCH = 64
LIMITS = StepLimits(max_step_tokens=MAX_BATCH, max_sequences=MAX_BATCH, max_sequence_tokens=512)


class SwitchedGroup:
    """A group that can be told to leave its exchanges out."""

    def __init__(self, group: TensorGroup) -> None:
        self._group = group
        self.rank = group.rank
        self.size = group.size
        self.meets = True

    def sum(self, tensor: Tensor) -> Tensor:
        """See `TensorGroup`."""
        return self._group.sum(tensor) if self.meets else tensor

    def deal_rows(self, own: Tensor, widths: Sequence[int], bounds: Sequence[int], out: Tensor) -> Tensor:
        """See `TensorGroup`."""
        return self._group.deal_rows(own, widths, bounds, out) if self.meets else out

    def gather_words(self, words: Tensor, bounds: Sequence[int]) -> None:
        """See `TensorGroup`."""
        if self.meets:
            self._group.gather_words(words, bounds)


class RankExecutor:
    """A rank's part of a model in bfloat16, or all of it where `place` is None."""

    def __init__(self, folder: Path, place: RankPlace | None, memory: str | None, threads: int = 1) -> None:
        model = describe_model(folder)
        place = place or RankPlace()
        part = shard_model(model.spec, place)
        weights = load_weights(model.folder, model.spec, LoadOptions(dtype="bfloat16"), part)
        blocks = MAX_BATCH * LIMITS.max_sequence_tokens // BLOCK_TOKENS
        region = KvRegion(kv_layout(part.spec, weights.dtype, BLOCK_TOKENS), blocks)
        self._group = SwitchedGroup(join_tensor_group(place, Meeting(memory), "bfloat16"))
        ranks = Ranks(self._group, None, part.vocabulary_start, part.vocabulary_widths)
        ops = NativeOps(CpuKernels("bfloat16", threads=threads))
        self._executor = TorchExecutor(part.spec, weights, region, ops, LIMITS, ranks)

    def decode_step(self, batch: int, context_tokens: int) -> StepInputs:
        """One row for each of `batch` sequences that have `context_tokens` tokens in the cache."""
        blocks = LIMITS.max_sequence_tokens // BLOCK_TOKENS
        table = torch.arange(batch * blocks, dtype=torch.int32)
        offsets = torch.arange(batch, dtype=torch.int32) * blocks
        position = context_tokens - 1
        slots = (offsets + position // BLOCK_TOKENS) * BLOCK_TOKENS + position % BLOCK_TOKENS
        return StepInputs(
            rows=batch,
            sequences=batch,
            samples=batch,
            token_ids=torch.arange(batch, dtype=torch.int32),
            positions=torch.full((batch,), position, dtype=torch.int32),
            slot_mapping=slots.to(torch.int32),
            query_start=torch.arange(batch + 1, dtype=torch.int32),
            sequence_lengths=torch.full((batch,), context_tokens, dtype=torch.int32),
            table_offsets=offsets,
            block_tables=table,
            sample_rows=torch.arange(batch, dtype=torch.int32),
        )

    def milliseconds(self, step: StepInputs, steps: int, *, meet: bool) -> float:
        """Mean time of a step. Ranks that meet before and after measure the same stretch of time."""
        self._group.meets = True
        self._executor.forward(step)
        self._group.meets = meet
        began = time.perf_counter()
        for _ in range(steps):
            self._executor.forward(step)
        return (time.perf_counter() - began) / steps * 1e3
