"""Projections: `y = x W^T + b` for the rows of a step.

A row more or less costs nothing up to the padding that products like; how the weight is laid out and multiplied is the
affair of its product. It does not know what is projected.
"""

from __future__ import annotations

from torch import Tensor

from llmscale.layers.activations import ProductInput
from llmscale.quant.method import Product


class Linear:
    """Weight [out, in], bias [out] or none, as some product holds them."""

    __slots__ = ("_product",)

    def __init__(self, product: Product) -> None:
        self._product = product

    def __call__(self, x: ProductInput, out: Tensor) -> Tensor:
        """x W^T + b for T rows of x, padded to P: returns [T, out], which lies in `out` [P, out] or in new memory."""
        return self._product.apply(x.padded, out)[: x.rows.shape[0]]
