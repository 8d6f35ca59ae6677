"""Gated MLP with SiLU (Shazeer 2020, arXiv 2002.05202): the reference of its elementwise part and the module.

Gate and up projections are one fused product. Linear in the elements, apart from the products. It does not know the
residual stream around it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmscale.layers.activations import Activations
from llmscale.layers.linear import Linear
from llmscale.layers.ops import Ops


def silu_mul(gate_up: Tensor) -> Tensor:
    """`silu(gate) * up` of [T, 2 F], gate first, in float32, rounded once to the dtype of `gate_up`."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    return (torch.nn.functional.silu(gate) * up).to(gate_up.dtype)


class GatedMlp:
    """down(silu(gate(x)) * up(x))."""

    __slots__ = ("_down", "_gate_up")

    def __init__(self, gate_up: Linear, down: Linear) -> None:
        self._gate_up = gate_up
        self._down = down

    def __call__(self, ops: Ops, activations: Activations) -> Tensor:
        """Reads `activations.normed`; returns what is to be added to the stream, [T, H]."""
        gate_up = self._gate_up(activations.normed, activations.gate_up)
        ops.silu_mul(gate_up, activations.inner.rows)
        return self._down(activations.inner, activations.delta)
