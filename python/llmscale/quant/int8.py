"""W8A8: signed 8-bit weights with a scale per output, activations quantized per token while they are used.

A row x of activations becomes `round(x * 127 / max|x|)`, products are exact in int32, and one scale of the row and one
of the output make the result (LLM.int8 without outlier columns, Dettmers et al. 2022, arXiv 2208.07339; SmoothQuant's
dynamic O1 without smoothing, Xiao et al. 2023, arXiv 2211.10438). On CPUs with VNNI oneDNN multiplies at twice the rate
of bfloat16. It does not know where weights come from.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from llmscale.errors import InvalidCheckpoint
from llmscale.quant.grid import CodeGrid, nonzero
from llmscale.quant.layouts import Cut, Int8Layout, Layout, Shape, StoredTensor
from llmscale.quant.product import has_vnni, require_cpu
from llmscale.quant.weight import QuantizedWeight

MAX_CODE = 127
"""Codes are symmetric; checkpoints may hold -128 too."""


class Int8:
    """`QuantMethod` for int8 weights."""

    __slots__ = ("_layout",)

    def __init__(self, layout: Int8Layout) -> None:
        self._layout = layout

    def weight_specs(self, shape: Shape) -> tuple[StoredTensor, ...]:
        """See `QuantMethod`."""
        return self._layout.weight_specs(shape)

    def load(self, tensors: Mapping[str, Tensor], cut: Cut) -> QuantizedWeight:
        """See `QuantMethod`."""
        scales = checked_scales(tensors["weight_scale"])
        outputs, inputs = cut.shape
        return QuantizedWeight(tensors["weight"], scales.reshape(-1, 1).expand(outputs, 1).contiguous(), inputs)

    def quantize(self, weight: Tensor) -> QuantizedWeight:
        """See `QuantMethod`; any width will do."""
        grid = self.grid(weight)
        return self.coded(grid, grid.codes(weight))

    def grid(self, weight: Tensor, share: float = 1.0) -> CodeGrid:
        """See `GriddedMethod`."""
        scales = weight.float().abs().amax(dim=1, keepdim=True) * share / MAX_CODE
        return CodeGrid(scales, torch.zeros_like(scales), -MAX_CODE, MAX_CODE, weight.shape[1], has_zeros=False)

    def coded(self, grid: CodeGrid, codes: Tensor) -> QuantizedWeight:
        """See `GriddedMethod`."""
        return QuantizedWeight(codes.to(torch.int8), grid.scales, grid.group_size)

    def stored(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        """See `QuantMethod`."""
        return {"weight": weight.codes, "weight_scale": weight.scales}

    def dequantize(self, weight: QuantizedWeight) -> Tensor:
        """See `QuantMethod`."""
        return weight.codes.float() * weight.scales

    def reference(self, x: Tensor, weight: QuantizedWeight, bias: Tensor | None = None) -> Tensor:
        """See `QuantMethod`. float64 holds sums of 2^37 products of two codes exactly."""
        codes, scales = quantize_rows(x)
        # The order of the factors is part of the result's last bit: the output's scale first, then the row's.
        sums = ((codes.double() - 128) @ weight.codes.double().t()).float() * weight.scales.t()
        result = sums * scales
        return (result if bias is None else result + bias.float()).to(x.dtype)

    def prepare(self, weight: QuantizedWeight, bias: Tensor | None, dtype: torch.dtype) -> OneDnnInt8 | PortableInt8:
        """See `QuantMethod`. Without VNNI oneDNN adds pairs of products in 16 bits, which saturates."""
        require_cpu(weight.codes.device, "int8")
        return OneDnnInt8(weight, bias) if has_vnni() else PortableInt8(self, weight, bias)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes of activations [T, K] plus 128, uint8, and the scale of each row, float32 [T, 1].

    Unsigned because x86 multiplies unsigned with signed bytes. A row of zeros has codes of zero.
    """
    largest = torch.linalg.vector_norm(x, torch.inf, dim=1, keepdim=True, dtype=torch.float32)
    codes = torch.mul(x, MAX_CODE / nonzero(largest)).round_().add_(128).to(torch.uint8)
    return codes, largest / MAX_CODE


def checked_scales(scales: Tensor, *, are_signed: bool = False) -> Tensor:
    """Scales as float32. Raises InvalidCheckpoint for one that is not finite, or negative unless they `are_signed`."""
    scales = scales.float()
    right = scales.isfinite() if are_signed else scales.isfinite() & (scales >= 0)
    if not bool(right.all()):
        what = "not a finite number" if are_signed else "negative or not a finite number"
        raise InvalidCheckpoint(f"A quantized weight has a scale that is {what}. Download or quantize it again.")
    return scales


class OneDnnInt8:
    """oneDNN's product of unsigned activations and signed weights, laid out once for it; for CPUs with VNNI.

    Measured beside `torch._int_mm` (2,048 x 2,048, one thread): 1 row 0.11 ms against 0.07, 4 rows 0.12 against 1.07,
    64 rows 1.3 against 2.0; bfloat16 has 0.22, 0.26 and 3.0.
    """

    __slots__ = ("_bias", "_no_zeros", "_scales", "_weight")

    kind = "onednn"

    def __init__(self, weight: QuantizedWeight, bias: Tensor | None) -> None:
        self._weight = torch.ops.onednn.qlinear_prepack(weight.codes, None)
        self._scales = weight.scales.flatten()
        self._no_zeros = torch.zeros(weight.outputs, dtype=torch.int32)
        self._bias = bias

    @property
    def total_bytes(self) -> int:
        """See `Product`."""
        return int(self._weight.numel()) + self._scales.nbytes + self._no_zeros.nbytes

    def apply(self, x: Tensor, out: Tensor) -> Tensor:
        """See `Product`."""
        codes, scales = quantize_rows(x)
        sums = torch.ops.onednn.qlinear_pointwise(
            codes, 1.0, 128, self._weight, self._scales, self._no_zeros, None, 1.0, 0, torch.float32, "none", [], ""
        )
        if self._bias is not None:
            # In float32, so that the result is rounded once.
            return torch.add(sums.mul_(scales), self._bias, out=out)
        return torch.mul(sums, scales, out=out)


class PortableInt8:
    """The reference itself, for CPUs on which nothing in torch multiplies bytes exactly."""

    __slots__ = ("_bias", "_method", "_weight")

    kind = "portable"

    def __init__(self, method: Int8, weight: QuantizedWeight, bias: Tensor | None) -> None:
        self._method = method
        self._weight = weight
        self._bias = bias

    @property
    def total_bytes(self) -> int:
        """See `Product`."""
        return self._weight.total_bytes

    def apply(self, x: Tensor, out: Tensor) -> Tensor:
        """See `Product`."""
        return self._method.reference(x, self._weight, self._bias)


def method(layout: Layout) -> Int8:
    """The method for a layout of int8 weights."""
    assert isinstance(layout, Int8Layout), layout
    return Int8(layout)
