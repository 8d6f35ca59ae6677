"""FP8 weights: e4m3 codes with a scale for the tensor, per output, or per block of 128 x 128 as in DeepSeek's
checkpoints (arXiv 2412.19437, section 3.3); activations stay as they are.

On CPUs weights become the dtype of the activations when they are loaded: no CPU of today multiplies FP8, and torch
converts 0.24 billion codes per second, a thousandth of what a product needs. So a CPU has the checkpoint's quality and
half of its size on disk, not in memory. It does not know where weights come from.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from llmscale.quant.dense import dense_product
from llmscale.quant.grid import nonzero
from llmscale.quant.int8 import checked_scales
from llmscale.quant.layouts import Cut, Fp8Layout, Fp8Scales, Layout, Shape, StoredTensor
from llmscale.quant.method import Product
from llmscale.quant.weight import QuantizedWeight, expanded, trimmed_groups

MAX_CODE = 448.0
"""The largest number in e4m3."""


class Fp8:
    """`QuantMethod` for e4m3 weights."""

    __slots__ = ("_layout",)

    def __init__(self, layout: Fp8Layout) -> None:
        self._layout = layout

    def weight_specs(self, shape: Shape) -> tuple[StoredTensor, ...]:
        """See `QuantMethod`."""
        return self._layout.weight_specs(shape)

    def load(self, tensors: Mapping[str, Tensor], cut: Cut) -> QuantizedWeight:
        """See `QuantMethod`. Scales of blocks become scales of outputs and groups of inputs."""
        layout = self._layout
        scales = checked_scales(tensors[layout.scale_name])
        outputs, inputs = cut.shape
        if layout.scales is not Fp8Scales.BLOCK:
            return QuantizedWeight(tensors["weight"], scales.reshape(-1, 1).expand(outputs, 1).contiguous(), inputs)
        rows, columns = layout.block
        scales = scales.repeat_interleave(rows, dim=0).narrow(0, cut.outputs[0] % rows, outputs)
        scales, group_size = trimmed_groups(scales, cut.inputs, columns)
        return QuantizedWeight(tensors["weight"], scales.contiguous(), group_size)

    def quantize(self, weight: Tensor) -> QuantizedWeight:
        """See `QuantMethod`: a scale per output."""
        assert self._layout.scales is Fp8Scales.CHANNEL, self._layout
        weight = weight.float()
        scales = weight.abs().amax(dim=1, keepdim=True) / MAX_CODE
        codes = (weight / nonzero(scales)).clamp_(-MAX_CODE, MAX_CODE).to(torch.float8_e4m3fn)
        return QuantizedWeight(codes, scales, weight.shape[1])

    def stored(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        """See `QuantMethod`; for scales per output."""
        assert self._layout.scales is Fp8Scales.CHANNEL, self._layout
        return {"weight": weight.codes, "weight_scale": weight.scales}

    def dequantize(self, weight: QuantizedWeight) -> Tensor:
        """See `QuantMethod`."""
        return weight.codes.float() * expanded(weight.scales, weight.group_size, weight.codes.shape[1])

    def reference(self, x: Tensor, weight: QuantizedWeight, bias: Tensor | None = None) -> Tensor:
        """See `QuantMethod`."""
        result = x.double() @ self.dequantize(weight).double().t()
        return (result if bias is None else result + bias.double()).to(x.dtype)

    def prepare(self, weight: QuantizedWeight, bias: Tensor | None, dtype: torch.dtype) -> Product:
        """See `QuantMethod`."""
        return dense_product(self.dequantize(weight).to(dtype), bias)


def method(layout: Layout) -> Fp8:
    """The method for a layout of FP8 weights."""
    assert isinstance(layout, Fp8Layout), layout
    return Fp8(layout)
