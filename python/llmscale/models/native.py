"""Which models the native executor runs, and where the numbers of their weights lie, as its builder takes it.

Works on a spec and the headers of a checkpoint, without torch, and reads no weights but what `stored_values` must know.
Linear in the number of weights. A scheme is one function here and one variant in `rust/executor`. It does not know
devices or steps.
"""

from __future__ import annotations

from dataclasses import dataclass

from llmscale.errors import ConfigError
from llmscale.models.checkpoint import Checkpoint
from llmscale.models.safetensors_header import DTYPE_BITS, TensorEntry
from llmscale.models.spec import BlockSpec, LinearSpec, ModelSpec, NormSpec, TensorSpec, WeightSpec
from llmscale.models.stored import StoredPart, stored_weights
from llmscale.models.stored_values import ordered_inputs, refuse_unused_biases
from llmscale.quant.layouts import Fp8Layout, Fp8Scales, Int4Layout, Int8Layout, Layout

TensorPlace = tuple[str, int, str, int, int]
"""(path, first byte, dtype as in safetensors, rows, columns)"""
StackPlaces = list[TensorPlace]
"""Tensors of one width, one below the other."""
NormPlace = tuple[StackPlaces, float]
LinearPlace = tuple[str, list[StackPlaces], StackPlaces | None, int, int]
"""(scheme, its stacks, bias, inputs, inputs of a group)"""


def native_refusal(spec: ModelSpec, checkpoint: Checkpoint) -> str | None:
    """Why the native executor cannot run a model; None if it can."""
    quantization = spec.quantization
    if quantization is None or isinstance(quantization.layout, Int8Layout):
        return None
    layout = quantization.layout
    if isinstance(layout, Fp8Layout):
        if layout.scales is Fp8Scales.BLOCK and layout.block[0] != layout.block[1]:
            return f"the native executor reads scales of square blocks, not of {layout.block[0]} x {layout.block[1]}"
        return None
    ordered = ordered_inputs(layout, checkpoint)
    return None if ordered is None else f"the native executor does not read inputs that are ordered ({ordered!r})"


@dataclass(frozen=True, slots=True)
class BlockPlaces:
    """The weights of one layer."""

    attention_norm: NormPlace
    head_norms: tuple[NormPlace, NormPlace] | None
    qkv: LinearPlace
    output: LinearPlace
    mlp_norm: NormPlace
    gate_up: LinearPlace
    down: LinearPlace

    @property
    def total_bytes(self) -> int:
        """Of the projections as they are stored."""
        linears = (self.qkv, self.output, self.gate_up, self.down)
        return sum(_bytes(place) for _, stacks, *_ in linears for stack in stacks for place in stack)


class WeightPlaces:
    """Where the weights of a model lie."""

    def __init__(self, spec: ModelSpec, checkpoint: Checkpoint) -> None:
        self._spec = spec
        self._checkpoint = checkpoint
        self._stored = stored_weights(spec, checkpoint.tensors)
        quantization = spec.quantization
        self._makes = quantization is not None and not quantization.is_stored
        self.total_bytes = sum(checkpoint.dtype_bytes.values())
        """Of all that is read."""

    def block(self, block: BlockSpec) -> BlockPlaces:
        """Of one layer."""
        attention = block.attention
        head_norms = None
        if attention.query_norm is not None and attention.key_norm is not None:
            head_norms = (self.norm(attention.query_norm), self.norm(attention.key_norm))
        return BlockPlaces(
            attention_norm=self.norm(block.attention_norm),
            head_norms=head_norms,
            qkv=self._linear(attention.qkv),
            output=self._linear(attention.output),
            mlp_norm=self.norm(block.mlp_norm),
            gate_up=self._linear(block.mlp.gate_up),
            down=self._linear(block.mlp.down),
        )

    def norm(self, norm: NormSpec) -> NormPlace:
        """Of one norm."""
        return self._stack(norm.weight), norm.epsilon

    def head(self) -> LinearPlace:
        """A dense head of a model of 4 or 8 bits is held in 8: in 16 it is half of what decode steps read."""
        head = self._spec.head.weight
        if head.name in self._stored:
            return self._linear(LinearSpec(head))
        layout = None if self._spec.quantization is None else self._spec.quantization.layout
        scheme = "int8" if isinstance(layout, Int8Layout | Int4Layout) else "dense"
        return scheme, [self._stack(head)], None, head.shape[1], 0

    def embedding(self) -> StackPlaces | None:
        """None where the head's table is the embedding's."""
        return None if self._spec.head.tied else self._stack(self._spec.embedding)

    def _linear(self, linear: LinearSpec) -> LinearPlace:
        weight = linear.weight
        bias = None if linear.bias is None else self._stack(linear.bias)
        layout = None if self._spec.quantization is None else self._spec.quantization.layout
        inputs = weight.shape[1]
        group = inputs if not isinstance(layout, Int4Layout) or layout.group_size is None else layout.group_size
        parts = self._stored.get(weight.name)
        if parts is None:
            return self._dense_scheme(layout, weight, group), [self._stack(weight)], bias, inputs, group
        if isinstance(layout, Int8Layout):
            stacks = [self._of_parts(parts, "weight"), self._of_parts(parts, "weight_scale")]
            return "int8-stored", stacks, bias, inputs, group
        if isinstance(layout, Fp8Layout):
            return self._fp8(layout, parts, bias, inputs)
        assert isinstance(layout, Int4Layout), layout
        refuse_unused_biases(layout, parts, self._checkpoint)
        names = (layout.codes, layout.scales, *(() if layout.zeros is None else (layout.zeros,)))
        if layout.is_transposed:
            # Tensors of a part have a width of their own each, so the parts are one after the other.
            stacks = [self._of_parts((part,), name) for part in parts for name in names]
            return _turned_scheme(layout), stacks, bias, inputs, group
        return "int4-stored", [self._of_parts(parts, name) for name in names], bias, inputs, group

    def _fp8(
        self, layout: Fp8Layout, parts: tuple[StoredPart, ...], bias: StackPlaces | None, inputs: int
    ) -> LinearPlace:
        """Codes of all parts, then the scales of each."""
        stacks = [self._of_parts(parts, "weight"), *(self._of_parts((part,), layout.scale_name) for part in parts)]
        return f"fp8-{layout.scales.value}", stacks, bias, inputs, layout.block[1]

    def _dense_scheme(self, layout: Layout | None, weight: WeightSpec, group: int) -> str:
        """What becomes of a weight that the checkpoint has dense."""
        if not self._makes:
            return "dense"
        if not isinstance(layout, Int4Layout):
            return "int8"
        if weight.shape[1] % group != 0:
            raise ConfigError(
                f"{weight.name!r} has {weight.shape[1]:,} input features, which groups of {group:,} do not divide. Use"
                " smaller groups, or int8."
            )
        return "int4" if layout.zeros is None else "int4-zeros"

    def _of_parts(self, parts: tuple[StoredPart, ...], suffix: str) -> StackPlaces:
        return [self._place(self._checkpoint.tensors[f"{part.prefix}.{suffix}"]) for part in parts]

    def _stack(self, weight: WeightSpec) -> StackPlaces:
        return [self._place(self._entry(part)) for part in weight.parts]

    def _entry(self, part: TensorSpec) -> TensorEntry:
        """A tied table may be stored under the head's name alone."""
        tensors, tied_name = self._checkpoint.tensors, self._spec.head.tied_name
        return tensors[part.name if tied_name is None or part.name in tensors else tied_name]

    def _place(self, entry: TensorEntry) -> TensorPlace:
        rows = entry.shape[0] if entry.shape else 1
        columns = entry.shape[1] if len(entry.shape) > 1 else 1
        return str(self._checkpoint.files[entry.file]), entry.begin, entry.dtype, rows, columns


def _turned_scheme(layout: Int4Layout) -> str:
    """Of codes that are stored inputs first."""
    if layout.format == "awq":
        return "int4-awq"
    return "int4-gptq" if layout.zero_offset == 1 else "int4-gptq-v2"


def _bytes(place: TensorPlace) -> int:
    _, _, dtype, rows, columns = place
    return rows * columns * DTYPE_BITS[dtype] // 8
