"""Products with weights in the dtype of activations: of a checkpoint that is not quantized, or dequantized when loaded.

On a CPU oneDNN's tiles make steps of 2 to 8 rows up to three times faster (measured: 896 x 9728 in bfloat16, four rows,
0.42 ms instead of 1.08 ms) and cost nothing for one row, so they are used wherever torch was built with oneDNN; the
original is then not kept. Results depend on the number of rows in the last bits. It does not know what is projected.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmscale.quant.method import Product
from llmscale.quant.product import tiles_supported

TILED_FOR_ROWS = 32
"""Rows that oneDNN is asked to tile for. From 8 on it chooses the same layout; for one row it chooses a poor one."""


def dense_product(weight: Tensor, bias: Tensor | None) -> Product:
    """The fastest product for a weight [N, K] where it lies; a bias has its dtype."""
    return product_class(weight.device, weight.dtype)(weight, bias)


def product_class(device: torch.device, dtype: torch.dtype) -> type[PlainProduct | TiledProduct]:
    """What `dense_product` makes for a device and dtype."""
    return TiledProduct if tiles_supported(device, dtype) else PlainProduct


class PlainProduct:
    """The weight as a checkpoint has it, `[N, K]`, so that the product for one row streams it in order."""

    __slots__ = ("_bias", "_transposed")

    kind = "dense"

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self._transposed = weight.t()
        self._bias = bias

    @property
    def total_bytes(self) -> int:
        """See `Product`."""
        return self._transposed.nbytes

    def apply(self, x: Tensor, out: Tensor) -> Tensor:
        """See `Product`; the result lies in `out`."""
        if self._bias is None:
            return torch.mm(x, self._transposed, out=out)
        return torch.addmm(self._bias, x, self._transposed, out=out)


class TiledProduct:
    """The weight in oneDNN's tiles, CPU only; the operations are those that torch's own compiler emits."""

    __slots__ = ("_bias", "_tiles")

    kind = "tiled"

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self._tiles: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, TILED_FOR_ROWS)
        self._bias = bias

    @property
    def total_bytes(self) -> int:
        """See `Product`."""
        return self._tiles.numel() * self._tiles.element_size()

    def apply(self, x: Tensor, out: Tensor) -> Tensor:
        """See `Product`; the result is new, since the operation cannot write into given memory."""
        result: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._tiles, self._bias, "none", [], "")
        return result
