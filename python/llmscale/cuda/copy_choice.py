"""Copy engine or copy kernel: chosen by what both took on this machine.

Engines cost per descriptor and leave the multiprocessors to the model; a kernel costs by bytes alone and takes some of
them. Where one overtakes the other differs from machine to machine, so both are measured at the start. Pure: a fit of
three coefficients per method, and a comparison, O(measurements). Does not know devices and clocks.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

KERNEL_ADVANTAGE = Fraction(4, 5)
"""A kernel must be predicted to take at most this share of the engine's time, because it slows the model beside it."""

MANY_BLOCKS = 64


class CopyMethod(enum.Enum):
    """Who moves blocks."""

    ENGINE = "engine"
    KERNEL = "kernel"


@dataclass(frozen=True, slots=True)
class CopyMeasurement:
    """`blocks` blocks of `block_bytes` in `runs` runs took `elapsed_ns`."""

    method: CopyMethod
    runs: int
    blocks: int
    block_bytes: int
    elapsed_ns: int

    def __post_init__(self) -> None:
        assert 0 < self.runs <= self.blocks, (self.runs, self.blocks)
        assert self.block_bytes > 0, self.block_bytes
        assert self.elapsed_ns > 0, self.elapsed_ns


@dataclass(frozen=True, slots=True)
class CopyCost:
    """`base_ns + runs * run_ns + mebibytes * mebibyte_ns`."""

    base_ns: int
    run_ns: int
    mebibyte_ns: int

    def predicted_ns(self, runs: int, copied_bytes: int) -> int:
        return self.base_ns + runs * self.run_ns + copied_bytes * self.mebibyte_ns // (1 << 20)


@dataclass(frozen=True, slots=True)
class CopyCosts:
    """What both methods cost in one direction on one machine."""

    engine: CopyCost
    kernel: CopyCost

    def choose(self, runs: int, copied_bytes: int) -> CopyMethod:
        """The engine, unless the kernel is faster by more than it costs the model."""
        kernel = self.kernel.predicted_ns(runs, copied_bytes)
        engine = self.engine.predicted_ns(runs, copied_bytes)
        return CopyMethod.KERNEL if kernel <= engine * KERNEL_ADVANTAGE else CopyMethod.ENGINE

    def summary(self, block_bytes: int) -> str:
        """Who moves one block, and who many scattered ones, for a log."""
        few, many = (self.choose(blocks, blocks * block_bytes).value for blocks in (1, MANY_BLOCKS))
        return few if few == many else f"{few}, {many} for {MANY_BLOCKS} blocks"


def fit_costs(measurements: Sequence[CopyMeasurement]) -> CopyCosts:
    """Least squares of relative errors, with no coefficient below zero. Each method needs three measurements."""
    by_method = {
        method: _fit([measured for measured in measurements if measured.method is method]) for method in CopyMethod
    }
    return CopyCosts(by_method[CopyMethod.ENGINE], by_method[CopyMethod.KERNEL])


def _fit(measurements: Sequence[CopyMeasurement]) -> CopyCost:
    assert len(measurements) >= 3, f"three coefficients of {len(measurements)} measurements"
    features = np.array(
        [[1.0, measured.runs, measured.blocks * measured.block_bytes / (1 << 20)] for measured in measurements]
    )
    # Divided by the time, so that a copy of 20 us counts as much as one of 20 ms.
    features /= np.array([[measured.elapsed_ns] for measured in measurements])
    columns = [0, 1, 2]
    solution = np.zeros(3)
    while columns:
        found, *_ = np.linalg.lstsq(features[:, columns], np.ones(len(measurements)), rcond=None)
        solution = np.zeros(3)
        solution[columns] = found
        if (found >= 0).all():
            break
        # A negative cost is noise: that coefficient is zero, and the others are fitted again.
        del columns[int(found.argmin())]
    return CopyCost(*(max(0, round(value)) for value in solution))
