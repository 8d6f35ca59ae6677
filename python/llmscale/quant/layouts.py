"""How a checkpoint stores quantized linear weights: names, shapes and packing of the tensors behind one weight.

Plain data without torch, made from a config by `models/quantization.py` and carried in a model's spec. A layout lists
its tensors for a weight `[out, in]` in O(1), each axis with the features that one entry stands for, so that a rank's
slice of the weight is a slice of every tensor. It does not know files, and it reads no values.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

MIN_GROUP = 32
"""Input features that share a scale, at least; kernels unpack 32 values at a time."""
MAX_GROUP = 1 << 17
NIBBLES = 8
"""4-bit values in one int32."""
FLOATS = ("F32", "BF16", "F16")

Shape = tuple[int, int]
"""(output features, input features)"""


class Feature(Enum):
    """What an axis of a stored tensor counts."""

    OUTPUT = "output"
    INPUT = "input"


@dataclass(frozen=True, slots=True)
class StoredAxis:
    """An axis whose entries stand for `per_entry` features each; None: one entry for all."""

    feature: Feature
    per_entry: int | None = 1

    def entries(self, shape: Shape) -> int:
        """Length of the axis for a weight of a shape."""
        return 1 if self.per_entry is None else -(-self._features(shape) // self.per_entry)

    def span(self, cut: Cut) -> tuple[int, int]:
        """First and last entry (excluded) that a cut needs; those at its ends may hold features outside it."""
        start, stop = cut.of(self.feature)
        return (0, 1) if self.per_entry is None else (start // self.per_entry, -(-stop // self.per_entry))

    def _features(self, shape: Shape) -> int:
        return shape[0] if self.feature is Feature.OUTPUT else shape[1]


@dataclass(frozen=True, slots=True)
class Cut:
    """The part of a weight that a rank holds: output and input features `start..stop` of a `whole`."""

    outputs: tuple[int, int]
    inputs: tuple[int, int]
    whole: Shape

    def of(self, feature: Feature) -> tuple[int, int]:
        """Start and stop along a feature."""
        return self.outputs if feature is Feature.OUTPUT else self.inputs

    @property
    def shape(self) -> Shape:
        """Shape of what is held."""
        return self.outputs[1] - self.outputs[0], self.inputs[1] - self.inputs[0]

    @property
    def divides_inputs(self) -> bool:
        """Whether some inputs are elsewhere, so that products are partial sums."""
        return self.shape[1] != self.whole[1]


def whole_cut(shape: Shape) -> Cut:
    """All of a weight."""
    return Cut((0, shape[0]), (0, shape[1]), shape)


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor behind a weight: `NAME.suffix` in the checkpoint.

    `axes` is empty for a single number, which may be stored in any shape of one element; `fixed_shape` stands instead
    of axes where the shape does not follow from the weight's. What is not `is_required` may be absent, and what is not
    `is_read` may be there and changes nothing.
    """

    suffix: str
    dtypes: tuple[str, ...]
    axes: tuple[StoredAxis, ...] = ()
    fixed_shape: tuple[int, ...] | None = None
    is_required: bool = True
    is_read: bool = True

    def shape(self, weight: Shape) -> tuple[int, ...]:
        """Its shape for a weight."""
        return self.fixed_shape or tuple(axis.entries(weight) for axis in self.axes)


@dataclass(frozen=True, slots=True)
class Int4Layout:
    """4-bit codes, eight to an int32 in the order `code_order`, with a scale per output and group of inputs.

    A weight is `(code - zero) * scale`; without stored zero points `zero` is 8. `is_transposed`: tensors are
    `[in, out]`. Codes are packed along `packed`, zero points along the outputs. `zero_offset` times
    0x11111111 is added to words of stored zero points. `group_index` names the group of every input feature
    (act-order).
    """

    format: str
    group_size: int | None
    is_transposed: bool
    packed: Feature
    codes: str
    scales: str
    zeros: str | None
    group_index: str | None = None
    shape_tensor: str | None = None
    code_order: tuple[int, ...] = tuple(range(NIBBLES))
    zero_offset: int = 0
    unused_bias: str | None = None
    """A bias of zeros that some writers add to projections that have none."""

    @property
    def method(self) -> str:
        return "int4"

    @property
    def label(self) -> str:
        """The word for it in a numerics id."""
        group = "channel" if self.group_size is None else f"g{self.group_size}"
        return f"int4-{group}"

    def weight_specs(self, shape: Shape) -> tuple[StoredTensor, ...]:
        """The tensors behind a weight of this shape, as in every layout."""
        out, across = StoredAxis(Feature.OUTPUT), StoredAxis(Feature.INPUT)
        groups = StoredAxis(Feature.INPUT, self.group_size)
        by_eight = StoredAxis(self.packed, NIBBLES)
        codes = (out, by_eight) if self.packed is Feature.INPUT else (by_eight, across)
        found = [
            StoredTensor(self.codes, ("I32", "U32"), self._turned(codes)),
            StoredTensor(self.scales, FLOATS, self._turned((out, groups))),
        ]
        if self.zeros is not None:
            axes = self._turned((StoredAxis(Feature.OUTPUT, NIBBLES), groups))
            found.append(StoredTensor(self.zeros, ("I32", "U32"), axes))
        if self.group_index is not None:
            found.append(StoredTensor(self.group_index, ("I32", "I64"), (across,), is_required=False))
        if self.shape_tensor is not None:
            found.append(StoredTensor(self.shape_tensor, ("I32", "I64"), fixed_shape=(2,), is_required=False))
        if self.unused_bias is not None:
            found.append(StoredTensor(self.unused_bias, FLOATS, (out,), is_required=False))
        return tuple(found)

    def _turned(self, axes: tuple[StoredAxis, StoredAxis]) -> tuple[StoredAxis, StoredAxis]:
        return (axes[1], axes[0]) if self.is_transposed else axes

    @property
    def input_group(self) -> int | None:
        """Input features that should stay together when ranks cut a weight."""
        return MIN_GROUP if self.group_size is None else self.group_size


@dataclass(frozen=True, slots=True)
class Int8Layout:
    """8-bit signed codes `[out, in]` with a scale per output, or one for all; activations are quantized per token."""

    format: str
    is_per_channel: bool = True

    @property
    def method(self) -> str:
        return "int8"

    @property
    def label(self) -> str:
        return "int8"

    def weight_specs(self, shape: Shape) -> tuple[StoredTensor, ...]:
        out, across = StoredAxis(Feature.OUTPUT), StoredAxis(Feature.INPUT)
        scales = (out, StoredAxis(Feature.INPUT, None)) if self.is_per_channel else ()
        return (StoredTensor("weight", ("I8",), (out, across)), StoredTensor("weight_scale", FLOATS, scales))

    @property
    def input_group(self) -> int | None:
        return None


class Fp8Scales(Enum):
    """What shares a scale in an FP8 weight."""

    TENSOR = "tensor"
    CHANNEL = "channel"
    BLOCK = "block"


@dataclass(frozen=True, slots=True)
class Fp8Layout:
    """e4m3 codes `[out, in]` with a scale for the tensor, per output, or per block of `block` outputs x inputs.

    A weight is `code * scale`, also where the scale's name says inverse. Scales of activations are not read, because
    activations keep their own dtype.
    """

    format: str
    scales: Fp8Scales
    scale_name: str = "weight_scale"
    block: tuple[int, int] = (1, 1)

    @property
    def method(self) -> str:
        return "fp8"

    @property
    def label(self) -> str:
        return f"fp8-{self.scales.value}"

    def weight_specs(self, shape: Shape) -> tuple[StoredTensor, ...]:
        out, across = StoredAxis(Feature.OUTPUT), StoredAxis(Feature.INPUT)
        axes: tuple[StoredAxis, ...] = ()
        if self.scales is Fp8Scales.CHANNEL:
            axes = (out, StoredAxis(Feature.INPUT, None))
        elif self.scales is Fp8Scales.BLOCK:
            axes = (StoredAxis(Feature.OUTPUT, self.block[0]), StoredAxis(Feature.INPUT, self.block[1]))
        return (
            StoredTensor("weight", ("F8_E4M3",), (out, across)),
            StoredTensor(self.scale_name, FLOATS, axes),
            StoredTensor("input_scale", FLOATS, is_required=False, is_read=False),
        )

    @property
    def input_group(self) -> int | None:
        return None


Layout = Int4Layout | Int8Layout | Fp8Layout


@dataclass(frozen=True, slots=True)
class Quantization:
    """How a model's linear weights are quantized: as its checkpoint stores them, or while a dense one is loaded."""

    layout: Layout
    is_stored: bool

    @property
    def label(self) -> str:
        """The word for it in a numerics id."""
        return self.layout.label


def compressed_int8() -> Int8Layout:
    """int-quantized of compressed-tensors."""
    return Int8Layout("compressed-tensors")


def compressed_int4(group_size: int | None, *, symmetric: bool) -> Int4Layout:
    """pack-quantized of compressed-tensors: codes packed along the inputs, zero points along the outputs.

    Codes whose order was only chosen by activation ("actorder": "weight") are stored in the natural one, others with a
    group index.
    """
    return Int4Layout(
        format="compressed-tensors",
        group_size=group_size,
        is_transposed=False,
        packed=Feature.INPUT,
        codes="weight_packed",
        scales="weight_scale",
        zeros=None if symmetric else "weight_zero_point",
        group_index="weight_g_idx",
        shape_tensor="weight_shape",
    )


def compressed_fp8(scales: Fp8Scales, block: tuple[int, int] = (1, 1)) -> Fp8Layout:
    """float-quantized of compressed-tensors."""
    return Fp8Layout("compressed-tensors", scales, block=block)


def awq_int4(group_size: int | None) -> Int4Layout:
    """AWQ's GEMM version: `[in, out]`, eight outputs to an int32 in the order of its CUDA kernel's registers."""
    return Int4Layout(
        format="awq",
        group_size=group_size,
        is_transposed=True,
        packed=Feature.OUTPUT,
        codes="qweight",
        scales="scales",
        zeros="qzeros",
        code_order=(0, 2, 4, 6, 1, 3, 5, 7),
    )


def gptq_int4(group_size: int | None, *, is_v2: bool) -> Int4Layout:
    """GPTQ: `[in, out]`, eight inputs to an int32; version 1 stores zero points less one."""
    return Int4Layout(
        format="gptq",
        group_size=group_size,
        is_transposed=True,
        packed=Feature.INPUT,
        codes="qweight",
        scales="scales",
        zeros="qzeros",
        group_index="g_idx",
        zero_offset=0 if is_v2 else 1,
        unused_bias="bias",
    )
