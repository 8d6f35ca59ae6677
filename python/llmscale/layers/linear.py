"""Dense projections: `y = x W^T + b`.

The weight keeps the layout of the checkpoint, `[out, in]`: for one row, a product over contiguous inputs streams it at
memory speed. Products are torch's, so results depend on the number of rows in the last bits. It does not know what is
projected; a quantized projection is another class with the same call.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Linear:
    """Weight [out, in], bias [out] or None."""

    __slots__ = ("_transposed", "bias")

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self._transposed = weight.t()
        self.bias = bias

    def __call__(self, x: Tensor, out: Tensor) -> None:
        """out = x W^T + b: [T, in], [T, out], one dtype."""
        if self.bias is None:
            torch.mm(x, self._transposed, out=out)
        else:
            torch.addmm(self.bias, x, self._transposed, out=out)
