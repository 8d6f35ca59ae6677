"""Builds the spec of a Llama-shaped decoder: the parts that Llama, Mistral, Qwen2 and Qwen3 have in common.

An architecture file reads what is its own from the config and passes it as `DecoderTraits`; sizes, tensor names, cut
axes and limits are the same for all. Work is linear in the number of layers. It does not know any architecture by name.
"""

from __future__ import annotations

from dataclasses import dataclass

from llmscale.errors import InvalidCheckpoint, UnsupportedModel
from llmscale.models import config as bounds
from llmscale.models.config import ConfigFields, read_rope
from llmscale.models.spec import (
    AttentionSpec,
    BlockSpec,
    HeadSpec,
    LinearSpec,
    MlpSpec,
    ModelSpec,
    NormSpec,
    RopeSpec,
    ShardAxis,
    TensorSpec,
    WeightSpec,
)

MAX_PARAMETERS = 1 << 42
"""4.4 trillion; byte counts stay far inside 64 bits."""


@dataclass(frozen=True, slots=True)
class DecoderTraits:
    """What differs between Llama-shaped architectures. `windowed_layers` attend to the latest `window_tokens`
    tokens only, the row's own included; the others, to all."""

    architecture: str
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    head_norms: bool = False
    default_head_dim: int | None = None
    window_tokens: int | None = None
    windowed_layers: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class _Sizes:
    """The sizes that every layer shares."""

    hidden: int
    inner: int
    query_heads: int
    kv_heads: int
    head_dim: int
    epsilon: float
    rope: RopeSpec
    traits: DecoderTraits


def decoder_spec(fields: ConfigFields, traits: DecoderTraits) -> ModelSpec:
    """The spec for a config. Raises InvalidCheckpoint and UnsupportedModel."""
    activation = fields.text("hidden_act", "silu")
    if activation != "silu":
        raise UnsupportedModel(f"{fields.source}: hidden_act is {activation!r}; only 'silu' is implemented.")
    rope = read_rope(fields)
    sizes = _sizes(fields, traits, rope.rope)
    layers = fields.integer("num_hidden_layers", 1, bounds.MAX_LAYERS)
    vocabulary = fields.integer("vocab_size", 2, bounds.MAX_VOCABULARY)
    embedding = _weight("embedding", "model.embed_tokens.weight", (vocabulary, sizes.hidden), ShardAxis.VOCABULARY)
    head_name = "lm_head.weight"
    if fields.boolean("tie_word_embeddings", default=False):
        head = HeadSpec(embedding, tied_name=head_name)
    else:
        head = HeadSpec(_weight("head", head_name, (vocabulary, sizes.hidden), ShardAxis.VOCABULARY))
    spec = ModelSpec(
        architecture=traits.architecture,
        hidden_size=sizes.hidden,
        vocabulary=vocabulary,
        max_sequence_tokens=rope.max_tokens,
        max_sequence_reason=rope.reason,
        embedding=embedding,
        blocks=tuple(_block(sizes, layer) for layer in range(layers)),
        norm=_norm("norm", "model.norm.weight", sizes.hidden, sizes.epsilon),
        head=head,
        pipeline_cuts=tuple(range(1, layers)),
        # Written by transformers before 4.32; recomputed from the config instead.
        ignored_tensors=frozenset(f"model.layers.{layer}.self_attn.rotary_emb.inv_freq" for layer in range(layers)),
    )
    if spec.parameters > MAX_PARAMETERS:
        raise InvalidCheckpoint(
            f"{fields.source} describes {spec.parameters:,} parameters, the limit is {MAX_PARAMETERS:,}."
        )
    return spec


def _sizes(fields: ConfigFields, traits: DecoderTraits, rope: RopeSpec) -> _Sizes:
    hidden = fields.integer("hidden_size", 1, bounds.MAX_HIDDEN_SIZE)
    query_heads = fields.integer("num_attention_heads", 1, bounds.MAX_HEADS)
    kv_heads = fields.integer("num_key_value_heads", 1, bounds.MAX_HEADS, query_heads)
    if query_heads % kv_heads != 0:
        raise InvalidCheckpoint(
            f"{fields.source}: num_attention_heads is {query_heads}, expected a multiple of num_key_value_heads "
            f"({kv_heads})."
        )
    if fields.present("head_dim") or traits.default_head_dim is not None:
        head_dim = fields.integer("head_dim", 1, bounds.MAX_HEAD_DIM, traits.default_head_dim)
    elif hidden % query_heads == 0:
        head_dim = hidden // query_heads
    else:
        raise InvalidCheckpoint(
            f"{fields.source}: hidden_size is {hidden}, expected a multiple of num_attention_heads ({query_heads}), "
            "since head_dim is not given."
        )
    if head_dim % bounds.HEAD_DIM_MULTIPLE != 0 or head_dim > bounds.MAX_HEAD_DIM:
        raise UnsupportedModel(
            f"{fields.source}: heads have {head_dim} elements; implemented are multiples of {bounds.HEAD_DIM_MULTIPLE} "
            f"up to {bounds.MAX_HEAD_DIM:,}."
        )
    return _Sizes(
        hidden=hidden,
        inner=fields.integer("intermediate_size", 1, bounds.MAX_INNER_SIZE),
        query_heads=query_heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        epsilon=fields.number("rms_norm_eps", 0.0, 1.0, 1e-6),
        rope=rope,
        traits=traits,
    )


def _block(sizes: _Sizes, layer: int) -> BlockSpec:
    ours, theirs = f"blocks.{layer}", f"model.layers.{layer}"
    return BlockSpec(
        attention_norm=_norm(f"{ours}.attention_norm", f"{theirs}.input_layernorm.weight", sizes.hidden, sizes.epsilon),
        attention=_attention(sizes, layer),
        mlp_norm=_norm(f"{ours}.mlp_norm", f"{theirs}.post_attention_layernorm.weight", sizes.hidden, sizes.epsilon),
        mlp=_mlp(sizes, ours, f"{theirs}.mlp"),
    )


def _attention(sizes: _Sizes, layer: int) -> AttentionSpec:
    traits, head_dim = sizes.traits, sizes.head_dim
    ours, theirs = f"blocks.{layer}", f"model.layers.{layer}.self_attn"
    query_size, kv_size = sizes.query_heads * head_dim, sizes.kv_heads * head_dim
    parts = (("q_proj", query_size), ("k_proj", kv_size), ("v_proj", kv_size))
    qkv = LinearSpec(
        WeightSpec(
            f"{ours}.attention.qkv.weight",
            tuple(TensorSpec(f"{theirs}.{part}.weight", (size, sizes.hidden), head_dim) for part, size in parts),
            ShardAxis.COLUMN,
        ),
        WeightSpec(
            f"{ours}.attention.qkv.bias",
            tuple(TensorSpec(f"{theirs}.{part}.bias", (size,), head_dim) for part, size in parts),
            ShardAxis.COLUMN,
        )
        if traits.qkv_bias
        else None,
    )
    output = LinearSpec(
        WeightSpec(
            f"{ours}.attention.output.weight",
            (TensorSpec(f"{theirs}.o_proj.weight", (sizes.hidden, query_size), head_dim),),
            ShardAxis.ROW,
        ),
        # Added once after the ranks' partial sums, so it is not cut.
        _weight(f"{ours}.attention.output.bias", f"{theirs}.o_proj.bias", (sizes.hidden,))
        if traits.output_bias
        else None,
    )
    norms = [
        _norm(f"{ours}.attention.{which}_norm", f"{theirs}.{which[0]}_norm.weight", head_dim, sizes.epsilon)
        if traits.head_norms
        else None
        for which in ("query", "key")
    ]
    return AttentionSpec(
        query_heads=sizes.query_heads,
        kv_heads=sizes.kv_heads,
        head_dim=head_dim,
        rope=sizes.rope,
        qkv=qkv,
        output=output,
        query_norm=norms[0],
        key_norm=norms[1],
        # Windowed layers keep the blocks of the whole sequence for now: one layer group, one block table.
        window_tokens=traits.window_tokens if layer in traits.windowed_layers else None,
    )


def _mlp(sizes: _Sizes, ours: str, theirs: str) -> MlpSpec:
    halves = ("gate_proj", "up_proj")
    bias = sizes.traits.mlp_bias
    return MlpSpec(
        gate_up=LinearSpec(
            WeightSpec(
                f"{ours}.mlp.gate_up.weight",
                tuple(TensorSpec(f"{theirs}.{half}.weight", (sizes.inner, sizes.hidden)) for half in halves),
                ShardAxis.COLUMN,
            ),
            WeightSpec(
                f"{ours}.mlp.gate_up.bias",
                tuple(TensorSpec(f"{theirs}.{half}.bias", (sizes.inner,)) for half in halves),
                ShardAxis.COLUMN,
            )
            if bias
            else None,
        ),
        down=LinearSpec(
            _weight(
                f"{ours}.mlp.down.weight", f"{theirs}.down_proj.weight", (sizes.hidden, sizes.inner), ShardAxis.ROW
            ),
            _weight(f"{ours}.mlp.down.bias", f"{theirs}.down_proj.bias", (sizes.hidden,)) if bias else None,
        ),
        inner_size=sizes.inner,
    )


def _norm(ours: str, theirs: str, size: int, epsilon: float) -> NormSpec:
    return NormSpec(_weight(f"{ours}.weight", theirs, (size,)), epsilon)


def _weight(ours: str, theirs: str, shape: tuple[int, ...], axis: ShardAxis = ShardAxis.NONE) -> WeightSpec:
    return WeightSpec(ours, (TensorSpec(theirs, shape),), axis)
