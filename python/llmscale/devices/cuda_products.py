"""Quantized weights as the CUDA operators multiply them: 4-bit and e4m3 weights in fragment order, others made dense.

Packing permutes bytes once, at load time. The operators compute in bfloat16: activations of a float32 model are rounded
on the way in and results on the way out, as on CPUs. They have implementations for CPUs too, so that everything here
runs where no device is. A workspace belongs to one stream. It does not know where weights come from.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmscale.cuda import operators
from llmscale.cuda.fragment_order import GROUPS, pack_e4m3, pack_groups, pack_int4, padded_columns
from llmscale.quant.dense import PlainProduct
from llmscale.quant.layouts import Layout
from llmscale.quant.method import Product, method_for
from llmscale.quant.weight import QuantizedWeight, unpacked_nibbles, with_groups

E4M3_GROUP = 128
DEPTH_MULTIPLE = 8
"""Kernels read eight activations at once."""


def cuda_product(
    layout: Layout, weight: QuantizedWeight, bias: Tensor | None, dtype: torch.dtype, workspace: Tensor
) -> Product:
    """A weight on the device that `workspace` is on. What has no kernel becomes dense, in the activations' dtype."""
    if layout.method == "int4" and _int4_group(weight) is not None:
        return CudaInt4(weight, bias, workspace)
    if layout.method == "fp8" and _e4m3_scales(weight) is not None:
        return CudaE4m3(weight, bias, workspace)
    return PlainProduct(method_for(layout).dequantize(weight).to(dtype), bias)


def _int4_group(weight: QuantizedWeight) -> int | None:
    """The largest group that kernels know and that divides the weight's."""
    if weight.codes.shape[1] * 2 % DEPTH_MULTIPLE != 0:
        return None
    return next((group for group in reversed(GROUPS) if weight.group_size % group == 0), None)


def _e4m3_scales(weight: QuantizedWeight) -> str | None:
    """How scales lie: by "column" or by "group" of 128; None for what no kernel reads."""
    depth = weight.codes.shape[1]
    if weight.codes.dtype != torch.float8_e4m3fn or depth % DEPTH_MULTIPLE != 0:
        return None
    if weight.group_size >= depth:
        return "column"
    # Kernels hold these scales in bfloat16; others would be rounded by up to a 256th.
    exact = bool((weight.scales.bfloat16().float() == weight.scales).all())
    return "group" if weight.group_size % E4M3_GROUP == 0 and exact else None


class CudaInt4:
    """4-bit weights with bfloat16 scales; see `llmscale::w4a16_matmul`."""

    __slots__ = ("_bias", "_columns", "_group", "_order", "_scales", "_weights", "_workspace", "_zeros")

    kind = "cuda"

    def __init__(self, weight: QuantizedWeight, bias: Tensor | None, workspace: Tensor) -> None:
        group = _int4_group(weight)
        assert group is not None, weight.group_size
        weight = with_groups(weight, group)
        depth = weight.codes.shape[1] * 2
        self._columns, self._group = weight.outputs, group
        self._weights = pack_int4(unpacked_nibbles(weight.codes))
        self._scales = pack_groups(weight.scales.bfloat16(), depth, group)
        self._zeros = None if weight.zeros is None else pack_groups(weight.zeros, depth, group)
        self._order = weight.order
        self._bias = bias
        self._workspace = workspace

    @property
    def total_bytes(self) -> int:
        """See `Product`."""
        tensors = (self._weights, self._scales, self._zeros, self._order)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    def apply(self, x: Tensor, out: Tensor) -> Tensor:
        """See `Product`."""
        if self._order is not None:
            x = x.index_select(1, self._order)
        result = operators.w4a16_matmul(
            x.bfloat16(), self._weights, self._scales, self._zeros, self._workspace, self._columns, self._group
        )
        return _with_bias(result, self._bias, out)


class CudaE4m3:
    """e4m3 weights with a scale per column or per 128 of depth; see `llmscale::w8a16_matmul`."""

    __slots__ = ("_bias", "_column_scales", "_columns", "_group_scales", "_weights", "_workspace")

    kind = "cuda"

    def __init__(self, weight: QuantizedWeight, bias: Tensor | None, workspace: Tensor) -> None:
        columns, depth = weight.codes.shape
        self._columns = columns
        self._weights = pack_e4m3(weight.codes)
        self._group_scales: Tensor | None = None
        self._column_scales: Tensor | None = None
        if _e4m3_scales(weight) == "column":
            self._column_scales = weight.scales.new_zeros(padded_columns(columns))
            self._column_scales[:columns] = weight.scales[:, 0]
        else:
            weight = with_groups(weight, E4M3_GROUP)
            self._group_scales = pack_groups(weight.scales.bfloat16(), depth, E4M3_GROUP)
        self._bias = bias
        self._workspace = workspace

    @property
    def total_bytes(self) -> int:
        """See `Product`."""
        tensors = (self._weights, self._group_scales, self._column_scales)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    def apply(self, x: Tensor, out: Tensor) -> Tensor:
        """See `Product`."""
        scales = (self._group_scales, self._column_scales)
        result = operators.w8a16_matmul(x.bfloat16(), self._weights, *scales, self._workspace, self._columns)
        return _with_bias(result, self._bias, out)


def _with_bias(result: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    if bias is not None:
        return torch.add(result, bias, out=out)
    return result if result.dtype == out.dtype else out.copy_(result)
