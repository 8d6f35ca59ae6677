"""Moves KV blocks by whichever of copy engine and copy kernel is faster here, after measuring both once.

Everything runs on the caller's current stream, which must not be the default one. Calibration copies real blocks within
scratch regions of the caller, about 30 ms per direction for blocks of 64 KiB; without it the engine does all copies.
O(n log n) in blocks per call. Does not know what is in a block, and waits for nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from llmscale.cuda.copy_choice import CopyCosts, CopyMeasurement, CopyMethod, fit_costs
from llmscale.cuda.copy_runs import Run, merge_runs
from llmscale.cuda.kv_blocks import BlockList, block_bytes, launch_copy
from llmscale.cuda.launch import Launcher

CALIBRATION_COUNTS = (1, 4, 16, 64)
CALIBRATION_REPEATS = 5
MIN_MEASUREMENTS = 8
"""Of both methods: blocks together and apart, few and one. Calibration without time ends there."""


class CopyEngine(Launcher, Protocol):
    """A launcher that also has copy engines; `CudaDevice` is one."""

    def copy_batch(self, targets: Sequence[int], sources: Sequence[int], sizes: Sequence[int]) -> None:
        """Starts copies between addresses on the current stream."""


@dataclass(frozen=True, slots=True)
class Regions:
    """Where blocks come from and go to: contiguous, blocks first, blocks of one size."""

    source: Tensor
    target: Tensor

    def __post_init__(self) -> None:
        assert block_bytes(self.source) == block_bytes(self.target), (self.source.shape, self.target.shape)


class BlockCopier:
    """Of one direction, such as device to host."""

    def __init__(self, engine: CopyEngine, device: torch.device, costs: CopyCosts | None = None) -> None:
        self._engine = engine
        self._device = device
        self._costs = costs

    def copy(self, regions: Regions, sources: Sequence[int], targets: Sequence[int]) -> CopyMethod | None:
        """Starts the copies. Tells which way they went, None if there are none."""
        runs = merge_runs(sources, targets)
        if not runs:
            return None
        method = CopyMethod.ENGINE
        if self._costs is not None:
            method = self._costs.choose(len(runs), len(sources) * block_bytes(regions.source))
        self._start(method, regions, runs, sources, targets)
        return method

    def calibrate(
        self,
        regions: Regions,
        elapsed_ns: Callable[[Callable[[], None]], int],
        has_time: Callable[[], bool] = lambda: True,
    ) -> CopyCosts:
        """Measures both ways with `elapsed_ns`, which runs its argument and says how long the device took.

        Blocks are copied to blocks of the same index, scattered (every other one, so that none are neighbours) and
        together. The target's content is lost. Once `has_time` says no, larger counts are left out.
        """
        blocks = min(regions.source.shape[0], regions.target.shape[0])
        assert blocks >= 2, f"calibration needs two blocks, the regions have {blocks}"
        found: list[CopyMeasurement] = []
        for count in CALIBRATION_COUNTS:
            for step in (1, 2):
                if len(found) >= MIN_MEASUREMENTS and not has_time():
                    continue
                chosen = list(range(0, blocks, step))[:count]
                runs = merge_runs(chosen, chosen)
                for method in CopyMethod:

                    def start(method: CopyMethod = method, runs: list[Run] = runs, chosen: list[int] = chosen) -> None:
                        self._start(method, regions, runs, chosen, chosen)

                    start()  # loads the kernel
                    best = min(elapsed_ns(start) for _ in range(CALIBRATION_REPEATS))
                    size = block_bytes(regions.source)
                    found.append(CopyMeasurement(method, len(runs), len(chosen), size, max(1, best)))
        self._costs = fit_costs(found)
        return self._costs

    def summary(self, block_bytes: int) -> str:
        """Who moves blocks of this size, for a log."""
        return CopyMethod.ENGINE.value if self._costs is None else self._costs.summary(block_bytes)

    def _start(
        self, method: CopyMethod, regions: Regions, runs: list[Run], sources: Sequence[int], targets: Sequence[int]
    ) -> None:
        if method is CopyMethod.KERNEL:
            blocks = BlockList.of(sources, targets, regions.source, regions.target, self._device)
            launch_copy(self._engine, regions.source, regions.target, blocks)
            return
        size = block_bytes(regions.source)
        for run in runs:
            assert 0 <= run.source <= regions.source.shape[0] - run.blocks, (run, regions.source.shape)
            assert 0 <= run.target <= regions.target.shape[0] - run.blocks, (run, regions.target.shape)
        self._engine.copy_batch(
            [regions.target.data_ptr() + run.target * size for run in runs],
            [regions.source.data_ptr() + run.source * size for run in runs],
            [run.blocks * size for run in runs],
        )
