"""The values that a quantized weight may take: a scale and a zero point per output and group of inputs.

Whoever chooses codes, by rounding or by a search, chooses them on a grid; a method then packs them as its formats want.
Linear in the elements of a weight. It does not know packing, files or activations.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class CodeGrid:
    """Of a weight [N, K]: element = `(code - shift) * scale` with `low <= code <= high`, all integers but the scale.

    `scales` and `shifts` are float32 [N, K / group_size]; a scale of zero has one value, zero. `has_zeros` says whether
    shifts are the grid's own or the method's constant.
    """

    scales: Tensor
    shifts: Tensor
    low: int
    high: int
    group_size: int
    has_zeros: bool

    def codes(self, weight: Tensor) -> Tensor:
        """The nearest codes of a weight [N, K], as float32."""
        groups = weight.float().view(*self.scales.shape, self.group_size)
        codes = (groups / nonzero(self.scales)[:, :, None]).round_().add_(self.shifts[:, :, None])
        return codes.clamp_(self.low, self.high).flatten(1)

    def values(self, codes: Tensor) -> Tensor:
        """What codes [N, K] stand for, float32."""
        groups = codes.float().view(*self.scales.shape, self.group_size)
        return ((groups - self.shifts[:, :, None]) * self.scales[:, :, None]).flatten(1)

    def column_codes(self, column: Tensor, group: int) -> Tensor:
        """The nearest codes of one input [N] of a group, as float32."""
        codes = (column / nonzero(self.scales[:, group])).round_().add_(self.shifts[:, group])
        return codes.clamp_(self.low, self.high)

    def column_values(self, codes: Tensor, group: int) -> Tensor:
        """What the codes of one input [N] of a group stand for."""
        return (codes - self.shifts[:, group]) * self.scales[:, group]

    def where(self, better: Tensor, other: CodeGrid) -> CodeGrid:
        """The groups of `other` where `better` [N, K / group_size], else these."""
        scales = torch.where(better, other.scales, self.scales)
        shifts = torch.where(better, other.shifts, self.shifts)
        return CodeGrid(scales, shifts, self.low, self.high, self.group_size, self.has_zeros)


def nonzero(scales: Tensor) -> Tensor:
    """Divisors: 1e-36 instead of less, so that groups of zeros give zeros and 127 divided by one is finite."""
    return scales.clamp_min(1e-36)
