"""What a product meets while calibration texts run through a block: second moments, magnitudes, and rows to compare on.

Moments are summed in float64 over products of batches in float32; rows are drawn once by a seed, the same tokens for
every product. Memory: inputs x inputs for moments, MAX_ROWS rows. It does not know what is done with them.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

MAX_ROWS = 1_024
"""Tokens on which scales are compared."""


class Moments:
    """X^T X of all rows so far."""

    def __init__(self, inputs: int) -> None:
        self.sums = torch.zeros(inputs, inputs, dtype=torch.float64)

    def add(self, rows: Tensor) -> None:
        """Takes rows [T, K]."""
        self.sums += rows.t() @ rows


class SampledRows:
    """Magnitudes of all rows, and a copy of those at chosen places in the order in which they come."""

    def __init__(self, chosen: Tensor) -> None:
        """`chosen` [R] int64, ascending, each below the number of rows that will come."""
        self._chosen = chosen
        self._seen = 0
        self._kept: list[Tensor] = []
        self._sums: Tensor | None = None

    def add(self, rows: Tensor) -> None:
        """Takes the next rows [T, K]."""
        first, last = self._seen, self._seen + rows.shape[0]
        here = self._chosen[(self._chosen >= first) & (self._chosen < last)] - first
        self._kept.append(rows[here])
        sums = rows.abs().sum(dim=0, dtype=torch.float64)
        self._sums = sums if self._sums is None else self._sums + sums
        self._seen = last

    @property
    def rows(self) -> Tensor:
        """[R, K]"""
        return torch.cat(self._kept)

    @property
    def magnitudes(self) -> Tensor:
        """Mean absolute value of each input, float32 [K]."""
        assert self._sums is not None, "rows come first"
        return (self._sums / self._seen).float()


def chosen_rows(total: int, seed: int) -> Tensor:
    """At most MAX_ROWS different numbers below `total`, ascending."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(total, generator=generator)[:MAX_ROWS].sort().values


def total_tokens(lengths: Iterable[tuple[int, ...]]) -> int:
    """Of batches with these lengths."""
    return sum(map(sum, lengths))
