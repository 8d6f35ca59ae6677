"""Dense projections: `y = x W^T + b`, in plain torch or with weights that oneDNN has laid out in tiles.

On a CPU the tiled layout makes steps of 2 to 8 rows up to three times faster (measured: 896 x 9728 in bfloat16, four
rows, 0.42 ms instead of 1.08 ms) and costs nothing for one row, so it is used wherever torch was built with oneDNN. The
original is then not kept. Results depend on the number of rows in the last bits. Quantized weights are multiplied by
`quant/`. It does not know what is projected.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from llmscale.layers.activations import ProductInput
from llmscale.quant.method import Product
from llmscale.quant.product import TILED_FOR_ROWS


class Linear(Protocol):
    """Weight [out, in], bias [out] or none."""

    def __call__(self, x: ProductInput, out: Tensor) -> Tensor:
        """x W^T + b for T rows of x, padded to P: returns [T, out], which lies in `out` [P, out] or in new memory."""


class DenseLinear:
    """The weight as the checkpoint has it: `[out, in]`, so that the product for one row streams it in order."""

    __slots__ = ("_bias", "_transposed")

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self._transposed = weight.t()
        self._bias = bias

    def __call__(self, x: ProductInput, out: Tensor) -> Tensor:
        """See `Linear`; the result lies in `out`."""
        if self._bias is None:
            torch.mm(x.padded, self._transposed, out=out)
        else:
            torch.addmm(self._bias, x.padded, self._transposed, out=out)
        return out[: x.rows.shape[0]]


class TiledLinear:
    """The weight in oneDNN's tiles, CPU only; the operations are those that torch's own compiler emits."""

    __slots__ = ("_bias", "_tiles")

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self._tiles = torch.ops.mkldnn._reorder_linear_weight(weight, TILED_FOR_ROWS)
        self._bias = bias

    def __call__(self, x: ProductInput, out: Tensor) -> Tensor:
        """See `Linear`; the result is new, since the operation cannot write into given memory."""
        result: Tensor = torch.ops.mkldnn._linear_pointwise(x.padded, self._tiles, self._bias, "none", [], "")
        return result[: x.rows.shape[0]]


class QuantizedLinear:
    """A quantized weight, as its method has laid it out."""

    __slots__ = ("_product",)

    def __init__(self, product: Product) -> None:
        self._product = product

    def __call__(self, x: ProductInput, out: Tensor) -> Tensor:
        """See `Linear`."""
        return self._product.apply(x.padded, out)[: x.rows.shape[0]]
