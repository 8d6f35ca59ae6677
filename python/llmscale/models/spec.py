"""The model spec: what an executor may know about a model, as plain data without torch.

A spec is made once from config.json by `models/<architecture>.py` and read by the loader and by every executor; nothing
else of a model exists. It names the parts in order, the checkpoint tensors behind every weight with shape and cut axis,
the numeric constants, and where a pipeline may cut. Size and time are linear in the number of layers. It does not know
devices, dtypes, files or how an operation is computed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from math import prod

from llmscale.errors import ConfigError
from llmscale.quant.layouts import Quantization


class ShardAxis(Enum):
    """Along which axis tensor-parallel ranks cut a weight."""

    NONE = "none"
    """Every rank holds all of it."""
    COLUMN = "column"
    """Output features (axis 0 of `[out, in]`): ranks compute disjoint outputs, no sum is needed."""
    ROW = "row"
    """Input features (axis 1 of `[out, in]`): ranks compute partial sums, an all-reduce follows."""
    VOCABULARY = "vocabulary"
    """Rows of the embedding or of the head."""


class RopeScaling(Enum):
    """How rotary frequencies are stretched to longer sequences than the model was first trained on."""

    NONE = "default"
    LINEAR = "linear"
    LLAMA3 = "llama3"


class Activation(Enum):
    """The function in a gated MLP."""

    SILU = "silu"


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor of the checkpoint. `shard_multiple` is the smallest piece that a rank may take along the cut axis:
    one head for projections to heads, else 1."""

    name: str
    shape: tuple[int, ...]
    shard_multiple: int = 1

    @property
    def elements(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True, slots=True)
class WeightSpec:
    """One weight of an executor: one checkpoint tensor, or several stacked along axis 0 in the order of `parts`.

    A fused weight is cut part by part (rank r takes its share of q, of k and of v), so `parts` also says where the
    pieces begin.
    """

    name: str
    parts: tuple[TensorSpec, ...]
    shard_axis: ShardAxis = ShardAxis.NONE

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the stack: `[sum of the parts' axis 0, rest]`."""
        return (sum(part.shape[0] for part in self.parts), *self.parts[0].shape[1:])

    @property
    def elements(self) -> int:
        return sum(part.elements for part in self.parts)


@dataclass(frozen=True, slots=True)
class LinearSpec:
    """`y = x W^T + b` with `W [out, in]` and `b [out]` or none."""

    weight: WeightSpec
    bias: WeightSpec | None = None


@dataclass(frozen=True, slots=True)
class NormSpec:
    """RMS norm: `x / sqrt(mean(x^2) + epsilon) * weight`, weight `[size]`."""

    weight: WeightSpec
    epsilon: float


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Rotary position embedding of the halves kind: element i is rotated with element i + head_dim / 2.

    Frequency i is `theta ** (-2 i / head_dim)`, then scaled. LINEAR divides all by `factor`. LLAMA3 divides those whose
    wavelength exceeds `original_tokens / low_frequency_factor`, keeps those below `original_tokens /
    high_frequency_factor`, and blends between.
    """

    theta: float
    scaling: RopeScaling = RopeScaling.NONE
    factor: float = 1.0
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 1.0
    original_tokens: int = 0


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """Grouped-query attention (Ainslie et al. 2023): query head h reads KV head `h // (query_heads / kv_heads)`.

    `qkv` is fused in this order: all query heads, all key heads, all value heads. `query_norm` and `key_norm` are RMS
    norms over each head, before the rotation. `layer_group` names the block table that the layer reads.
    """

    query_heads: int
    kv_heads: int
    head_dim: int
    rope: RopeSpec
    qkv: LinearSpec
    output: LinearSpec
    query_norm: NormSpec | None = None
    key_norm: NormSpec | None = None
    window_tokens: int | None = None
    layer_group: int = 0

    @property
    def query_size(self) -> int:
        return self.query_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.kv_heads * self.head_dim

    @property
    def scale(self) -> float:
        """Factor of the scores before the softmax."""
        return float(self.head_dim**-0.5)


@dataclass(frozen=True, slots=True)
class MlpSpec:
    """Gated MLP: `down(activation(gate(x)) * up(x))`; `gate_up` is fused, gate first."""

    gate_up: LinearSpec
    down: LinearSpec
    inner_size: int
    activation: Activation = Activation.SILU


@dataclass(frozen=True, slots=True)
class BlockSpec:
    """One layer: `x += attention(norm(x)); x += mlp(norm(x))`."""

    attention_norm: NormSpec
    attention: AttentionSpec
    mlp_norm: NormSpec
    mlp: MlpSpec


@dataclass(frozen=True, slots=True)
class HeadSpec:
    """Projection to the vocabulary. Tied: it is the embedding's table, and `weight` is the embedding's WeightSpec.

    A tied checkpoint may store the table under either name; `tied_name` is the head's own.
    """

    weight: WeightSpec
    tied_name: str | None = None

    @property
    def tied(self) -> bool:
        return self.tied_name is not None


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A decoder. `max_sequence_tokens` is the longest sequence that is computed as the model's authors define it, and
    `max_sequence_reason` says what sets it. `pipeline_cuts` lists the blocks before which a pipeline stage may begin.
    `ignored_tensors` may be in the checkpoint and are not read. A pipeline stage's spec holds its own blocks only;
    the first stage has the embedding, the last one norm and head."""

    architecture: str
    hidden_size: int
    vocabulary: int
    max_sequence_tokens: int
    max_sequence_reason: str
    embedding: WeightSpec
    blocks: tuple[BlockSpec, ...]
    norm: NormSpec
    head: HeadSpec
    pipeline_cuts: tuple[int, ...]
    ignored_tensors: frozenset[str] = field(default_factory=frozenset)
    is_first_stage: bool = True
    is_last_stage: bool = True
    quantization: Quantization | None = None
    """Of the linear weights of the blocks, and of a head where the checkpoint stores it so; None: all are dense."""

    def weights(self) -> Iterator[WeightSpec]:
        """Every weight once, in the order of computation."""
        if self.is_first_stage or (self.is_last_stage and self.head.tied):
            yield self.embedding
        for block in self.blocks:
            yield block.attention_norm.weight
            yield from _linear_weights(block.attention.qkv)
            if block.attention.query_norm is not None:
                yield block.attention.query_norm.weight
            if block.attention.key_norm is not None:
                yield block.attention.key_norm.weight
            yield from _linear_weights(block.attention.output)
            yield block.mlp_norm.weight
            yield from _linear_weights(block.mlp.gate_up)
            yield from _linear_weights(block.mlp.down)
        if self.is_last_stage:
            yield self.norm.weight
            if not self.head.tied:
                yield self.head.weight

    def linears(self) -> Iterator[LinearSpec]:
        """The projections that may be quantized: those of the blocks and a head of its own."""
        for block in self.blocks:
            yield from (block.attention.qkv, block.attention.output, block.mlp.gate_up, block.mlp.down)
        if self.is_last_stage and not self.head.tied:
            yield LinearSpec(self.head.weight)

    @property
    def parameters(self) -> int:
        """Number of parameters; a tied table counts once."""
        return sum(weight.elements for weight in self.weights())

    def sequence_limit(self, requested_tokens: int | None) -> int:
        """The longest sequence to serve: the model's own, or a lower one that was asked for.

        Raises ConfigError if more is asked for than the model defines, or less than a prompt and an answer.
        """
        if requested_tokens is None:
            return self.max_sequence_tokens
        if not 2 <= requested_tokens <= self.max_sequence_tokens:
            advice = "more" if requested_tokens < 2 else "less, or serve a model with a longer context"
            raise ConfigError(
                f"max_sequence_tokens (max_model_len, --max-model-len) is {requested_tokens:,}, but this model allows 2"
                f" to {self.max_sequence_tokens:,} ({self.max_sequence_reason}). Ask for {advice}."
            )
        return requested_tokens


def _linear_weights(linear: LinearSpec) -> Iterator[WeightSpec]:
    yield linear.weight
    if linear.bias is not None:
        yield linear.bias
