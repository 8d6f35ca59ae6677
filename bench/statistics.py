"""Medians, spreads and percentiles of measured values. O(n log n); knows nothing of what was measured."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Spread:
    """The median of repeated measurements with their extremes."""

    median: float
    low: float
    high: float
    repeats: int


def spread(values: Sequence[float]) -> Spread:
    """Of at least one value."""
    return Spread(statistics.median(values), min(values), max(values), len(values))


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that at least `percent` % of the values do not exceed (nearest rank), of at least one value.

    Nearest rank, because an interpolated 99th percentile of 50 values is a number that nobody measured.
    """
    if not 0 < percent <= 100:
        raise ValueError(f"percent is {percent}, it must be above 0 and at most 100")
    ordered = sorted(values)
    rank = -(-len(ordered) * percent // 100)
    return ordered[int(rank) - 1]
