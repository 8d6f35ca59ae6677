"""From a GGUF file's metadata to a config.json and to the names that its tensors have in a checkpoint.

llama (Mistral too), qwen2 and qwen3. llama files store query and key rows in pairs, as rotation of neighbours wants
them; `permuted_heads` says for which tensors that must be undone. What would change the arithmetic without being
implemented is refused by name. O(tensors). It reads no weights but the factors of a scaled rotation.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from llmscale.errors import InvalidCheckpoint, UnsupportedModel
from llmscale.models import config as bounds
from llmscale.models.config import ConfigFields
from llmscale.models.gguf_header import GgufHeader
from llmscale.models.gguf_tokenizer import ends_by_text

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
ROPE_FACTORS = "rope_freqs.weight"
ORIGINAL_TOKENS, LOW_FACTOR, HIGH_FACTOR = 8_192, 1.0, 4.0
"""Of all Llama 3.1 to 3.3 models; their files hold factors only."""
FACTOR_TOLERANCE = 1e-3

_WHOLE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_BLOCK_NAME = re.compile(r"blk\.(\d{1,4})\.([a-z_]+)\.(weight|bias)")


@dataclass(frozen=True, slots=True)
class GgufModel:
    """What a file's model is: config.json, the checkpoint's name of each tensor, and heads whose rows are in pairs."""

    config: dict[str, object]
    names: dict[str, str]
    """The file's name by the checkpoint's."""
    permuted_heads: dict[str, int]
    """Number of heads by the checkpoint's name."""


def checkpoint_name(name: str) -> str | None:
    """The checkpoint's name of a file's tensor; None for one that no supported architecture has."""
    if name in _WHOLE:
        return _WHOLE[name]
    found = _BLOCK_NAME.fullmatch(name)
    if found is None or found[2] not in _BLOCK:
        return None
    return f"model.layers.{int(found[1])}.{_BLOCK[found[2]]}.{found[3]}"


def read_gguf_model(header: GgufHeader, shown: str, rope_factors: Sequence[float] | None) -> GgufModel:
    """`rope_factors` are the values of ROPE_FACTORS where the file has it.

    Raises UnsupportedModel for an architecture, tensor or rotation that is not implemented, InvalidCheckpoint for
    metadata outside its bounds.
    """
    fields = ConfigFields(header.metadata, shown)
    parts = fields.integer("split.count", 0, 1 << 16, 1)
    if parts > 1:
        raise UnsupportedModel(
            f"{shown} is one of {parts} parts of a model. Merge them first: llama-gguf-split --merge FIRST-PART"
            " MERGED.gguf"
        )
    kind = fields.text("general.architecture")
    if kind not in ARCHITECTURES:
        raise UnsupportedModel(
            f"{shown}: general.architecture is {kind[:40]!r}; implemented are {', '.join(ARCHITECTURES)}."
        )
    names: dict[str, str] = {}
    for name in header.tensors:
        translated = checkpoint_name(name)
        if translated is not None:
            names[translated] = name
        elif name != ROPE_FACTORS:
            raise UnsupportedModel(f"{shown} has a tensor {name[:80]!r}, which {kind} models do not have here.")
    config = _config(fields, kind, header, names, rope_factors)
    heads: dict[str, int] = {}
    if kind == "llama":
        for layer in range(fields.integer(f"{kind}.block_count", 1, bounds.MAX_LAYERS)):
            for part, key in (("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads")):
                count = config[key]
                assert isinstance(count, int)
                for suffix in ("weight", "bias"):
                    heads[f"model.layers.{layer}.self_attn.{part}.{suffix}"] = count
    return GgufModel(config, names, heads)


def _config(
    fields: ConfigFields, kind: str, header: GgufHeader, names: Mapping[str, str], factors: Sequence[float] | None
) -> dict[str, object]:
    def integer(name: str, maximum: int, default: int | None = None) -> int:
        return fields.integer(f"{kind}.{name}", 1, maximum, default)

    _refuse(fields, kind)
    heads = integer("attention.head_count", bounds.MAX_HEADS)
    hidden = integer("embedding_length", bounds.MAX_HIDDEN_SIZE)
    head_dim = integer("attention.key_length", bounds.MAX_HEAD_DIM, max(1, hidden // heads))
    for name in ("attention.value_length", "rope.dimension_count"):
        if integer(name, bounds.MAX_HIDDEN_SIZE, head_dim) != head_dim:
            raise UnsupportedModel(f"{fields.source}: {kind}.{name} is not the {head_dim} of the keys' heads.")
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None:
        raise InvalidCheckpoint(f"{fields.source} has no tensor token_embd.weight. Download it again.")
    first = "model.layers.0."
    return {
        "architectures": [ARCHITECTURES[kind]],
        "model_type": kind,
        "hidden_size": hidden,
        "intermediate_size": integer("feed_forward_length", bounds.MAX_INNER_SIZE),
        "num_hidden_layers": integer("block_count", bounds.MAX_LAYERS),
        "num_attention_heads": heads,
        "num_key_value_heads": integer("attention.head_count_kv", bounds.MAX_HEADS, heads),
        "head_dim": head_dim,
        "vocab_size": embedding.shape[0],
        "max_position_embeddings": integer("context_length", bounds.MAX_POSITIONS),
        "rms_norm_eps": _decimal(fields.number(f"{kind}.attention.layer_norm_rms_epsilon", 0.0, 1.0, 1e-5)),
        "rope_theta": _decimal(fields.number(f"{kind}.rope.freq_base", 1.0, 1e12, 10_000.0)),
        "rope_scaling": _rope_scaling(fields, kind, head_dim, factors),
        "hidden_act": "silu",
        "tie_word_embeddings": "lm_head.weight" not in names,
        "attention_bias": kind != "qwen2" and first + "self_attn.q_proj.bias" in names,
        "mlp_bias": first + "mlp.gate_proj.bias" in names,
        "eos_token_id": _end_ids(fields, header, embedding.shape[0]),
    }


def _decimal(number: float) -> float:
    """The shortest decimal that is this float32: files round 1e-5 to 9.99999975e-06, and configs do not."""
    for digits in range(1, 10):
        short = float(f"{number:.{digits}g}")
        if struct.pack("<f", short) == struct.pack("<f", number):
            return short
    return number


def _refuse(fields: ConfigFields, kind: str) -> None:
    for name in ("expert_count", "attention.sliding_window"):
        if fields.integer(f"{kind}.{name}", 0, 1 << 31, 0) > 0:
            raise UnsupportedModel(f"{fields.source}: {kind}.{name} is set, which is not implemented for GGUF files.")


def _end_ids(fields: ConfigFields, header: GgufHeader, vocabulary: int) -> list[int]:
    """The ids that the file names, and those that llama.cpp knows by their text: files mostly name one of several."""
    names = [f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom")]
    named = {fields.integer(name, 0, bounds.MAX_VOCABULARY) for name in names if fields.present(name)}
    return sorted(named | {token for token in ends_by_text(header.metadata) if token < vocabulary})


def _rope_scaling(
    fields: ConfigFields, kind: str, head_dim: int, factors: Sequence[float] | None
) -> dict[str, object] | None:
    scaling = fields.text(f"{kind}.rope.scaling.type", "none")
    if factors is not None:
        return _llama3(fields, kind, head_dim, factors)
    if scaling == "none":
        for name in ("rope.scaling.factor", "rope.scale_linear"):
            # Others take a factor without a type for a linear one.
            if fields.number(f"{kind}.{name}", 0.0, 1e4, 1.0) not in (0.0, 1.0):
                raise UnsupportedModel(
                    f"{fields.source}: {kind}.{name} scales rotations linearly, which is not implemented for GGUF"
                    " files. Serve the original folder."
                )
        return None
    if scaling == "linear":
        # The context of a file includes the factor, max_position_embeddings of a config does not.
        factor = fields.number(f"{kind}.rope.scaling.factor", 1.0, 1e4)
        if factor == 1.0:
            return None
    raise UnsupportedModel(
        f"{fields.source}: {kind}.rope.scaling.type is {scaling[:40]!r}; of scaled rotations only Llama 3's is"
        " implemented for GGUF files. Serve the original folder."
    )


def _llama3(fields: ConfigFields, kind: str, head_dim: int, factors: Sequence[float]) -> dict[str, object]:
    """The parameters from which the file's factors were made: the largest factor, and constants of the family."""
    theta = fields.number(f"{kind}.rope.freq_base", 1.0, 1e12, 10_000.0)
    largest = max(factors, default=0.0)
    fits = 1 <= largest <= 1e4 and len(factors) == head_dim // 2
    if fits:
        expected = [_llama3_factor(theta ** (-2 * i / head_dim), largest) for i in range(head_dim // 2)]
        pairs = zip(factors, expected, strict=True)
        fits = all(abs(given - wanted) <= FACTOR_TOLERANCE * wanted for given, wanted in pairs)
    if not fits:
        raise UnsupportedModel(
            f"{fields.source}: {ROPE_FACTORS} is not made as Llama 3's is (low 1, high 4, 8,192 tokens); other scaled"
            " rotations are not implemented for GGUF files. Serve the original folder."
        )
    return {
        "rope_type": "llama3",
        "factor": float(largest),
        "low_freq_factor": LOW_FACTOR,
        "high_freq_factor": HIGH_FACTOR,
        "original_max_position_embeddings": ORIGINAL_TOKENS,
    }


def _llama3_factor(frequency: float, largest: float) -> float:
    """By what a frequency is divided."""
    wavelength = 2 * math.pi / frequency
    if wavelength < ORIGINAL_TOKENS / HIGH_FACTOR:
        return 1.0
    if wavelength > ORIGINAL_TOKENS / LOW_FACTOR:
        return largest
    kept = (ORIGINAL_TOKENS / wavelength - LOW_FACTOR) / (HIGH_FACTOR - LOW_FACTOR)
    return 1 / ((1 - kept) / largest + kept)
