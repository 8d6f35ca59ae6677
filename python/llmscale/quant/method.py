"""What a quantization method is: the tensors it reads, the weight it makes of them, its oracle and its product.

A new method is one file with a class of this shape, one test and one line in `METHODS`; a new device gives `prepare`
another product. `reference` is plain torch and slow on purpose: every kernel is compared with it. It does not know
models, files or ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Protocol

import torch
from torch import Tensor

from llmscale.quant.grid import CodeGrid
from llmscale.quant.layouts import Cut, Layout, Shape, StoredTensor
from llmscale.quant.weight import QuantizedWeight


class Product(Protocol):
    """A weight laid out for one device, ready to multiply."""

    @property
    def kind(self) -> str:
        """How it is computed, for the numerics id."""

    @property
    def total_bytes(self) -> int:
        """Memory that it holds."""

    def apply(self, x: Tensor, out: Tensor) -> Tensor:
        """x W^T + b: [P, K] to [P, N] in the dtype of `out` [P, N], which holds the result unless it is new memory."""


class QuantMethod(Protocol):
    """One method for one layout of a checkpoint."""

    def weight_specs(self, shape: Shape) -> tuple[StoredTensor, ...]:
        """The checkpoint's tensors behind a weight [out, in]."""

    def load(self, tensors: Mapping[str, Tensor], cut: Cut) -> QuantizedWeight:
        """What a rank holds, from the entries of each tensor (by suffix) that `StoredAxis.span` names for its cut.

        Raises InvalidCheckpoint for values that cannot be and UnsupportedModel for a cut that kernels cannot compute.
        """

    def quantize(self, weight: Tensor) -> QuantizedWeight:
        """A dense weight [N, K], rounded to the nearest. Raises ConfigError for a width that groups do not divide."""

    def stored(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        """The tensors of `weight_specs` for a whole weight, by suffix; for layouts that are written."""

    def dequantize(self, weight: QuantizedWeight) -> Tensor:
        """The weight [N, K] in float32, inputs in their natural order."""

    def reference(self, x: Tensor, weight: QuantizedWeight, bias: Tensor | None = None) -> Tensor:
        """The oracle: x [T, K] in float32 or bfloat16 to [T, N] in the same dtype, with exact sums inside."""

    def prepare(self, weight: QuantizedWeight, bias: Tensor | None, dtype: torch.dtype) -> Product:
        """The product on the weight's device for activations of a dtype; the weight's own tensors are not kept."""


class GriddedMethod(QuantMethod, Protocol):
    """A method whose weights are codes on a grid, so that a calibration can choose them."""

    def grid(self, weight: Tensor, share: float = 1.0) -> CodeGrid:
        """The grid that spans `share` of the range of each group of a weight [N, K]. Raises ConfigError as `quantize`
        does."""

    def coded(self, grid: CodeGrid, codes: Tensor) -> QuantizedWeight:
        """The weight of codes [N, K] on a grid."""


METHODS: dict[str, str] = {
    "int8": "llmscale.quant.int8",
    "int4": "llmscale.quant.int4",
    "fp8": "llmscale.quant.fp8",
}
"""Name and module, which has `method(layout) -> QuantMethod`."""


GRIDDED = ("int8", "int4")
"""Those that are a `GriddedMethod`."""


def method_for(layout: Layout) -> QuantMethod:
    """The method that reads a layout."""
    make: Callable[[Layout], QuantMethod] = import_module(METHODS[layout.method]).method
    return make(layout)


def gridded_method_for(layout: Layout) -> GriddedMethod | None:
    """The same where its codes lie on a grid; None for floating-point codes."""
    if layout.method not in GRIDDED:
        return None
    make: Callable[[Layout], GriddedMethod] = import_module(METHODS[layout.method]).method
    return make(layout)
