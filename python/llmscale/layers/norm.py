"""RMS norm (Zhang and Sennrich 2019, arXiv 1910.07467), alone and after the addition of a residual.

Owns the reference arithmetic and the module of the executor. Linear in the elements. It does not know what it is that
it normalizes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmscale.layers.ops import Ops


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """`x / sqrt(mean(x^2) + epsilon) * weight` over the last axis, summed in float32.

    As in transformers the normalized row is rounded to the dtype of `x` before the weight is applied.
    """
    wide = x.float()
    variance = wide.square().mean(-1, keepdim=True)
    return weight * (wide * torch.rsqrt(variance + epsilon)).to(x.dtype)


class RmsNorm:
    """A norm with its weight `[H]`."""

    __slots__ = ("epsilon", "weight")

    def __init__(self, weight: Tensor, epsilon: float) -> None:
        self.weight = weight
        self.epsilon = epsilon

    def __call__(self, ops: Ops, x: Tensor, out: Tensor) -> None:
        """out = norm(x), both [T, H]."""
        ops.rms_norm(x, self.weight, self.epsilon, out)

    def after_add(self, ops: Ops, x: Tensor, residual: Tensor, out: Tensor) -> None:
        """residual += x; out = norm(residual); all [T, H]."""
        ops.add_rms_norm(x, residual, self.weight, self.epsilon, out)
