"""W4A16: 4-bit weights with a scale, and maybe a zero point, per output and group of inputs; activations stay as they
are.

Rounded to the nearest when a dense checkpoint is quantized while it is loaded; GPTQ (Frantar et al. 2022, arXiv
2210.17323) and AWQ (Lin et al. 2023, arXiv 2306.00978) choose better codes and are read. Inputs that a checkpoint
orders by group (act-order) are gathered before the product. On CPUs torch's own kernel multiplies, whose groups have 32
to 256 inputs; larger ones repeat their scale. It does not know where weights come from.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import gcd

import torch
from torch import Tensor

from llmscale.errors import ConfigError, InvalidCheckpoint, UnsupportedModel
from llmscale.quant.grid import CodeGrid, nonzero
from llmscale.quant.int8 import checked_scales
from llmscale.quant.layouts import MIN_GROUP, NIBBLES, Cut, Feature, Int4Layout, Layout, Shape, StoredTensor
from llmscale.quant.product import require_cpu
from llmscale.quant.weight import (
    QuantizedWeight,
    as_bytes,
    as_words,
    expanded,
    packed_nibbles,
    trimmed_groups,
    unpacked_nibbles,
    with_groups,
)

MIDDLE = 8
"""The zero point of symmetric codes."""
MAX_CODE = 15
ONES = 0x11111111
"""An int32 word of eight ones."""
KERNEL_GROUPS = (256, 128, 64, 32)
ROWS_TOGETHER = 4_096
"""Outputs that are widened to int32 at once while a weight is laid out; a multiple of the kernel's 64."""


class Int4:
    """`QuantMethod` for int4 weights."""

    __slots__ = ("_layout",)

    def __init__(self, layout: Int4Layout) -> None:
        self._layout = layout

    def weight_specs(self, shape: Shape) -> tuple[StoredTensor, ...]:
        """See `QuantMethod`."""
        return self._layout.weight_specs(shape)

    def load(self, tensors: Mapping[str, Tensor], cut: Cut) -> QuantizedWeight:
        """See `QuantMethod`."""
        layout = self._layout
        self._check(tensors, cut)
        codes = _unpacked(tensors[layout.codes], layout, layout.packed, layout.code_order)
        codes = _trimmed(codes, cut, layout.packed)
        # Codes reach from -8 to 7 around their zero point, and AutoRound gives -8 to the larger end, whatever its sign.
        scales = checked_scales(_upright(tensors[layout.scales], layout), are_signed=True)
        zeros = None
        if layout.zeros is not None:
            words = _raised(tensors[layout.zeros], layout.zero_offset)
            zeros = _trimmed(_unpacked(words, layout, Feature.OUTPUT, layout.code_order), cut, Feature.OUTPUT)
        order = self._order(tensors, cut)
        group_size = cut.whole[1] if layout.group_size is None else layout.group_size
        scales, size = trimmed_groups(scales, cut.inputs, group_size)
        if zeros is not None:
            zeros, _ = trimmed_groups(zeros, cut.inputs, group_size)
        # Kernels take whole groups; a cut may end within one.
        whole = gcd(size, cut.shape[1])
        if whole % MIN_GROUP != 0:
            raise ConfigError(
                f"A rank's inputs {cut.inputs[0]:,} to {cut.inputs[1]:,} of {cut.whole[1]:,} cut the groups of"
                f" {group_size:,} that share a scale into pieces of {whole}; kernels need {MIN_GROUP} or a multiple."
                " Use fewer tensor-parallel ranks, or pipeline stages."
            )
        if order is not None:
            codes = codes[:, order]
        weight = with_groups(QuantizedWeight(packed_nibbles(codes), scales, size, zeros, order), whole)
        groups = cut.shape[1] // whole
        return replace(
            weight,
            scales=weight.scales[:, :groups].contiguous(),
            zeros=None if weight.zeros is None else weight.zeros[:, :groups],
        )

    def _check(self, tensors: Mapping[str, Tensor], cut: Cut) -> None:
        layout = self._layout
        said = None if layout.shape_tensor is None else tensors.get(layout.shape_tensor)
        if said is not None and tuple(said.tolist()) != cut.whole:
            raise InvalidCheckpoint(f"A {layout.shape_tensor} says {said.tolist()}, the model needs {list(cut.whole)}.")
        bias = None if layout.unused_bias is None else tensors.get(layout.unused_bias)
        if bias is not None and bool(bias.any()):
            raise UnsupportedModel(
                f"A quantized projection has a {layout.unused_bias} that is not zero, but this architecture has none"
                " there. The checkpoint is of another model than its config says."
            )

    def _order(self, tensors: Mapping[str, Tensor], cut: Cut) -> Tensor | None:
        """The inputs sorted by group, or None where they are. Raises InvalidCheckpoint and ConfigError."""
        layout = self._layout
        if layout.group_index is None or layout.group_index not in tensors or layout.group_size is None:
            return None
        groups = tensors[layout.group_index].long()
        natural = torch.arange(*cut.inputs) // layout.group_size
        if torch.equal(groups, natural):
            return None
        if cut.divides_inputs:
            raise ConfigError(
                "The checkpoint orders input features by activation (act-order, desc_act), so a rank's share of them"
                " has parts of all groups. Use one tensor-parallel rank, with pipeline stages if need be."
            )
        if not torch.equal(groups.sort().values, natural):
            raise InvalidCheckpoint(
                f"A {layout.group_index} does not name each of its {cut.whole[1] // layout.group_size:,} groups"
                f" {layout.group_size:,} times. Download or quantize the model again."
            )
        return groups.argsort(stable=True)

    def quantize(self, weight: Tensor) -> QuantizedWeight:
        """See `QuantMethod`. Scales are rounded up to bfloat16, which kernels compute with, before codes are chosen, so
        that no weight is off by more than half of its scale."""
        grid = self.grid(weight)
        return self.coded(grid, grid.codes(weight))

    def grid(self, weight: Tensor, share: float = 1.0) -> CodeGrid:
        """See `GriddedMethod`."""
        outputs, inputs = weight.shape
        group_size = inputs if self._layout.group_size is None else self._layout.group_size
        if inputs % group_size != 0:
            raise ConfigError(
                f"A weight has {inputs:,} input features, which groups of {group_size:,} do not divide. Use smaller"
                " groups, int8, or fewer tensor-parallel ranks."
            )
        groups = weight.float().view(outputs, -1, group_size)
        has_zeros = self._layout.zeros is not None
        if has_zeros:
            low, high = groups.amin(dim=2).clamp_max(0) * share, groups.amax(dim=2).clamp_min(0) * share
            scales = raised_to_bfloat16((high - low) / MAX_CODE)
            shifts = (-low / nonzero(scales)).round_().clamp_(0, MAX_CODE)
        else:
            scales = raised_to_bfloat16(groups.abs().amax(dim=2) * share / (MAX_CODE / 2))
            shifts = torch.full_like(scales, MIDDLE)
        return CodeGrid(scales, shifts, 0, MAX_CODE, group_size, has_zeros)

    def coded(self, grid: CodeGrid, codes: Tensor) -> QuantizedWeight:
        """See `GriddedMethod`."""
        zeros = grid.shifts.to(torch.uint8) if grid.has_zeros else None
        return QuantizedWeight(packed_nibbles(codes.to(torch.uint8)), grid.scales, grid.group_size, zeros)

    def stored(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        """See `QuantMethod`; for compressed-tensors."""
        assert self._layout.format == "compressed-tensors", self._layout.format
        outputs, inputs = weight.outputs, weight.codes.shape[1] * 2
        found = {
            "weight_packed": as_words(weight.codes),
            "weight_scale": weight.scales.bfloat16(),
            "weight_shape": torch.tensor([outputs, inputs]),
        }
        if weight.zeros is not None:
            padded = torch.nn.functional.pad(weight.zeros.t(), (0, -outputs % NIBBLES))
            found["weight_zero_point"] = as_words(packed_nibbles(padded)).t().contiguous()
        return found

    def dequantize(self, weight: QuantizedWeight) -> Tensor:
        """See `QuantMethod`."""
        codes = unpacked_nibbles(weight.codes).float()
        inputs = codes.shape[1]
        zeros = MIDDLE if weight.zeros is None else expanded(weight.zeros.float(), weight.group_size, inputs)
        values = (codes - zeros) * expanded(weight.scales, weight.group_size, inputs)
        if weight.order is None:
            return values
        natural = torch.empty_like(values)
        natural[:, weight.order] = values
        return natural

    def reference(self, x: Tensor, weight: QuantizedWeight, bias: Tensor | None = None) -> Tensor:
        """See `QuantMethod`."""
        result = x.double() @ self.dequantize(weight).double().t()
        return (result if bias is None else result + bias.double()).to(x.dtype)

    def prepare(self, weight: QuantizedWeight, bias: Tensor | None, dtype: torch.dtype) -> TorchInt4:
        """See `QuantMethod`."""
        require_cpu(weight.codes.device, "int4")
        return TorchInt4(weight, bias)


class TorchInt4:
    """torch's product for CPUs, with bfloat16 in and out: in float32 it takes 30 to 70 times longer, so activations and
    results of a float32 model are rounded here. A zero point becomes `(8 - zero) * scale`, rounded to bfloat16 too: at
    most a thirtieth of the error that rounding to codes makes.

    Measured beside bfloat16 tiles (2,048 x 2,048, one thread): 1 row 0.24 ms against 0.22, 4 rows 0.44 against 0.26, 64
    rows 6.3 against 3.0. It saves memory, not time.
    """

    __slots__ = ("_bias", "_codes", "_group_size", "_order", "_outputs", "_scales_and_zeros")

    kind = "torch"

    def __init__(self, weight: QuantizedWeight, bias: Tensor | None) -> None:
        self._group_size = next(size for size in KERNEL_GROUPS if weight.group_size % size == 0)
        weight = with_groups(weight, self._group_size)
        self._outputs = weight.outputs
        # The kernel takes outputs by 16; the ones that are added have scales of zero.
        added = -weight.outputs % 16
        self._codes = _kernel_codes(weight.codes, added)
        zeros = torch.zeros_like(weight.scales) if weight.zeros is None else MIDDLE - weight.zeros.float()
        pairs = torch.stack((weight.scales, zeros * weight.scales), dim=2)
        pairs = torch.nn.functional.pad(pairs, (0, 0, 0, 0, 0, added))
        self._scales_and_zeros = pairs.transpose(0, 1).to(torch.bfloat16).contiguous()
        self._order = weight.order
        self._bias = bias

    @property
    def total_bytes(self) -> int:
        """See `Product`."""
        return self._codes.nbytes + self._scales_and_zeros.nbytes + (0 if self._order is None else self._order.nbytes)

    def apply(self, x: Tensor, out: Tensor) -> Tensor:
        """See `Product`."""
        if self._order is not None:
            x = x.index_select(1, self._order)
        result: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
            x.bfloat16(), self._codes, self._group_size, self._scales_and_zeros
        )
        result = result[:, : self._outputs]
        if self._bias is not None:
            return torch.add(result, self._bias, out=out)
        return result if result.dtype == out.dtype and result.is_contiguous() else out.copy_(result)


def _kernel_codes(packed: Tensor, added: int) -> Tensor:
    """Codes in the kernel's layout; it takes them as int32, so the rows go in pieces."""
    pieces: list[Tensor] = []
    for first in range(0, packed.shape[0], ROWS_TOGETHER):
        codes = unpacked_nibbles(packed[first : first + ROWS_TOGETHER]).int()
        if first + ROWS_TOGETHER >= packed.shape[0]:
            codes = torch.nn.functional.pad(codes, (0, 0, 0, added))
        pieces.append(torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1))
    return torch.cat(pieces) if len(pieces) > 1 else pieces[0]


def _upright(stored: Tensor, layout: Int4Layout) -> Tensor:
    """`[out, in]` whatever the checkpoint has."""
    return stored.t() if layout.is_transposed else stored


def _raised(words: Tensor, offset: int) -> Tensor:
    """int32 words with `offset` added to their eight values.

    Writers that store zero points less one subtract from whole words, so a value of 0 is stored as 15 and borrows of
    the next one: adding to words gives both back.
    """
    if offset == 0:
        return words
    # In int64, because an int32 that overflows is not torch's promise.
    return ((words.long() + offset * ONES + (1 << 31)) % (1 << 32) - (1 << 31)).int()


def _unpacked(stored: Tensor, layout: Int4Layout, packed: Feature, order: tuple[int, ...]) -> Tensor:
    """uint8 codes `[out, in]` from int32 that are packed along one of the two: eight times as long there."""
    values = _upright(stored, layout)
    values = values.t() if packed is Feature.OUTPUT else values
    # Now packed along the last axis; byte b of a word has values 2b and 2b + 1.
    nibbles = unpacked_nibbles(as_bytes(values))
    if order != tuple(range(NIBBLES)):
        places = torch.tensor(order).argsort()
        nibbles = nibbles.view(nibbles.shape[0], -1, NIBBLES)[:, :, places].flatten(1)
    return nibbles.t() if packed is Feature.OUTPUT else nibbles


def _trimmed(values: Tensor, cut: Cut, packed: Feature) -> Tensor:
    """Without the neighbours of a cut that lie in the same int32."""
    start, stop = cut.of(packed)
    first = start % NIBBLES
    return values.narrow(0 if packed is Feature.OUTPUT else 1, first, stop - start)


def raised_to_bfloat16(scales: Tensor) -> Tensor:
    """The next bfloat16 that is not less, as float32, for finite values that are not negative."""
    return ((scales.view(torch.int32) + 0xFFFF) & -0x10000).view(torch.float32)


def method(layout: Layout) -> Int4:
    """The method for a layout of int4 weights."""
    assert isinstance(layout, Int4Layout), layout
    return Int4(layout)
