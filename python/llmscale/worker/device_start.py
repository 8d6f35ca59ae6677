"""How a worker settles on a device: how many KV blocks it has room for, its graphs, its sampler.

Weights are there already. The largest step is run once and measured; what is then free, less twice that step (eager
steps and graphs each keep as much) and a margin, becomes the KV region. So a step finds its memory, and what others
take of the device meanwhile meets the margin first. Takes one step of the largest size and one per graph. It does not
know checkpoints or engines.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from llmscale.devices.interface import Accelerator, MemoryFigures
from llmscale.errors import ConfigError
from llmscale.logs import get_logger
from llmscale.parallel.groups import World
from llmscale.worker.device_steps import DeviceStepper
from llmscale.worker.executor_torch import Ranks, TorchExecutor
from llmscale.worker.kv_layout import KvLayout
from llmscale.worker.kv_region import KvRegion
from llmscale.worker.step import StepInputs, StepLimits
from llmscale.worker.step_memory import StepMemory

_log = get_logger("llmscale.worker")

MARGIN_SHARE = 32
"""A 32nd of the device is left free: fragments of the allocator, libraries' workspaces, other processes."""
MIN_MARGIN_BYTES = 256 << 20


def blocks_within(figures: MemoryFigures, step_bytes: int, layout: KvLayout, limits: StepLimits, most: int) -> int:
    """KV blocks that the free memory has room for, `most` at most. Raises ConfigError if one sequence has none."""
    margin = max(MIN_MARGIN_BYTES, figures.total_bytes // MARGIN_SHARE)
    room = max(0, figures.free_bytes - 2 * step_bytes - margin)
    blocks = min(most, room // layout.block_bytes)
    needed = -(-limits.max_sequence_tokens // layout.block_tokens)
    if blocks < needed:
        raise ConfigError(
            f"The device has {figures.free_bytes:,} of {figures.total_bytes:,} bytes free once the weights are loaded;"
            f" steps take {2 * step_bytes:,}, a margin of {margin:,} stays free, which leaves {blocks:,} blocks"
            f" of {layout.block_bytes:,} bytes. One sequence of max_sequence_tokens = {limits.max_sequence_tokens:,}"
            f" needs {needed:,}. Lower --max-model-len or --max-num-batched-tokens, quantize, or use more ranks."
        )
    return blocks


def profiled_step(limits: StepLimits, block_tokens: int, device: torch.device) -> tuple[StepInputs, int]:
    """The largest step: chunks of prompts of which each samples; and the KV blocks that it writes."""
    rows = limits.max_step_tokens
    length = max(1, min(limits.max_sequence_tokens, rows))
    spans = [(first, min(first + length, rows)) for first in range(0, rows, length)][: limits.max_sequences]
    rows = spans[-1][1]
    blocks_each = -(-length // block_tokens)

    def int32(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    positions = [row - first for first, last in spans for row in range(first, last)]
    slots = [
        index * blocks_each * block_tokens + row - first
        for index, (first, last) in enumerate(spans)
        for row in range(first, last)
    ]
    # As many rows sample as can: sequences but for the last one's sake repeat their last row.
    samples = [spans[min(index, len(spans) - 1)][1] - 1 for index in range(min(limits.max_sequences, rows))]
    inputs = StepInputs(
        rows=rows,
        sequences=len(spans),
        samples=len(samples),
        token_ids=int32([0] * rows),
        positions=int32(positions),
        slot_mapping=int32(slots),
        query_start=int32([*(first for first, _ in spans), rows]),
        sequence_lengths=int32([last - first for first, last in spans]),
        table_offsets=int32([index * blocks_each for index in range(len(spans))]),
        block_tables=int32(list(range(blocks_each * len(spans)))),
        sample_rows=int32(samples),
    )
    return inputs, blocks_each * len(spans)


class DeviceStart:
    """Makes executor, region and stepper of a worker on a device apart."""

    def __init__(self, accelerator: Accelerator, device: torch.device, limits: StepLimits, layout: KvLayout) -> None:
        self._accelerator = accelerator
        self._device = device
        self._limits = limits
        self._layout = layout

    def begin(
        self, make: Callable[[KvRegion], TorchExecutor], most: int, ranks: Ranks, world: World | None
    ) -> tuple[KvRegion, TorchExecutor, DeviceStepper]:
        """Makes all that steps need, measures the largest step and makes as large a region as there is room for then,
        of `most` blocks at most; the ranks of a world agree on what the smallest has. Raises ConfigError."""
        accelerator = self._accelerator
        step, blocks = profiled_step(self._limits, self._layout.block_tokens, self._device)
        executor = make(KvRegion(self._layout, blocks, self._device))
        memory = StepMemory(accelerator, self._device, self._limits, self._layout.block_tokens)
        # 16 bytes per row and id: half a gigabyte for 256 rows of 128,256.
        width = executor.logits_width
        sampler = accelerator.sampler(width, self._limits.max_sequences) if width > 0 else None
        stepper = DeviceStepper(
            accelerator, executor, memory, self._limits, sampler, ranks.tensor, is_alone=ranks.are_alone
        )
        step_bytes = accelerator.peak_bytes(lambda: executor.forward(step)) if world is None else 0
        found = blocks_within(accelerator.memory(), step_bytes, self._layout, self._limits, most)
        found = found if world is None else world.least(found)
        _log.info("KV cache", blocks=found, megabytes=found * self._layout.block_bytes >> 20, step_mb=step_bytes >> 20)
        region = KvRegion(self._layout, found, self._device)
        executor.use_region(region)
        # What was made so far was made on another stream than steps run on.
        accelerator.empty_cache()
        if world is None:
            # Ranks meet within a step; that has been built for eager steps alone.
            _log.info("captured decode steps", graphs=stepper.capture_graphs())
        return region, executor, stepper
