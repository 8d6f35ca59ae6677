"""Which weights a checkpoint stores quantized, and the tensors behind each of their parts.

The tensors decide, not the patterns in a config: a projection is quantized if its codes are there. A product is fused
from parts (q, k and v), so all of them are quantized or none. Linear in the number of weights, without torch or
files. It does not know what the tensors hold.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from llmscale.errors import InvalidCheckpoint, UnsupportedModel
from llmscale.models.safetensors_header import TensorEntry
from llmscale.models.spec import LinearSpec, ModelSpec, TensorSpec
from llmscale.quant.layouts import Layout, Shape, StoredTensor


@dataclass(frozen=True, slots=True)
class StoredPart:
    """The tensors behind one part of a fused weight, whole."""

    prefix: str
    shape: Shape
    tensors: tuple[StoredTensor, ...]
    refusal: str | None = None
    """Why a weight of this shape cannot be stored like this."""

    def named_tensors(self) -> Iterator[tuple[str, StoredTensor]]:
        """Names in the checkpoint."""
        for tensor in self.tensors:
            yield f"{self.prefix}.{tensor.suffix}", tensor

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.named_tensors()]


def stored_weights(spec: ModelSpec, tensors: Mapping[str, TensorEntry]) -> dict[str, tuple[StoredPart, ...]]:
    """By the name of the weight, for weights that are quantized in the checkpoint.

    Raises UnsupportedModel for a product of quantized and dense parts, InvalidCheckpoint if nothing is quantized though
    the config says so.
    """
    if spec.quantization is None or not spec.quantization.is_stored:
        return {}
    layout = spec.quantization.layout
    found: dict[str, tuple[StoredPart, ...]] = {}
    for linear in spec.linears():
        weight = linear.weight
        quantized = [part.name for part in weight.parts if _is_stored(layout, part, tensors)]
        if not quantized:
            continue
        if len(quantized) < len(weight.parts):
            raise UnsupportedModel(
                f"{quantized[0]!r} is quantized, but not all of {', '.join(part.name for part in weight.parts)}, which"
                " are one product here. Quantize all of them or none."
            )
        found[weight.name] = tuple(_part(layout, part, linear) for part in weight.parts)
    if not found and spec.is_last_stage and spec.is_first_stage:
        raise InvalidCheckpoint(
            f"config.json says that the weights are quantized ({layout.format}, {layout.label}), but no projection of"
            " the checkpoint is. Remove quantization_config from a copy of the folder, or use the right files."
        )
    return found


def _is_stored(layout: Layout, part: TensorSpec, tensors: Mapping[str, TensorEntry]) -> bool:
    codes = layout.weight_specs(_shape(part))[0]
    entry = tensors.get(f"{_prefix(part)}.{codes.suffix}")
    # Where codes are stored under the name of a dense weight, the dtype tells.
    return entry is not None and (codes.suffix != "weight" or entry.dtype in codes.dtypes)


def _part(layout: Layout, part: TensorSpec, linear: LinearSpec) -> StoredPart:
    shape = _shape(part)
    needs_no_bias = linear.bias is None
    tensors = tuple(tensor for tensor in layout.weight_specs(shape) if tensor.suffix != "bias" or needs_no_bias)
    return StoredPart(_prefix(part), shape, tensors, _refusal(layout, part, shape))


def _refusal(layout: Layout, part: TensorSpec, shape: Shape) -> str | None:
    unit = layout.input_group
    if unit is None or shape[1] % unit == 0:
        return None
    return f"{part.name!r} has {shape[1]:,} input features, which groups of {unit:,} do not divide"


def _prefix(part: TensorSpec) -> str:
    return part.name.removesuffix(".weight")


def _shape(part: TensorSpec) -> Shape:
    outputs, inputs = part.shape
    return outputs, inputs
