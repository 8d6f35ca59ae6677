"""GGUF files written by ggml's own package from tensors of a checkpoint, the way llama.cpp's converter lays them out.

The rows of query and key are put in pairs here by the converter's own expression, which shares nothing with what undoes
it. `gguf_tokenizer` trains a tiny byte-level BPE, so that a file has a vocabulary of its own.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf.constants import GGMLQuantizationType
from gguf.quants import quantize
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from llmscale.models.registry import describe_model
from llmscale.models.spec import ModelSpec
from tests.models_support import random_tensors, write_config

SIZES: dict[str, object] = {
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 320,
    "max_position_embeddings": 256,
}
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEXTS = ("The fox doesn't count 12345 apples.\n\n  It counts 6!", "Füchse zählen 7 Äpfel…", "a  b\tc\r\nd 'S")
BLOCK_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
TypeOf = Callable[[str], str]
"""Block type of a tensor by the checkpoint's name."""


def write_dense(folder: Path, **changes: object) -> dict[str, Tensor]:
    """A random model folder's config, and its tensors in float32; the folder has no weights."""
    write_config(folder, **(SIZES | changes))
    tensors = random_tensors(describe_model(folder).spec)
    return {name: 1 + 0.1 * value if "norm" in name else value * 0.05 for name, value in tensors.items()}


def write_gguf(
    path: Path,
    folder: Path,
    tensors: dict[str, Tensor],
    *,
    kind: str = "llama",
    type_of: TypeOf = lambda _: "F32",
    tokenizer: Tokenizer | None = None,
    split: str = "llama-bpe",
    metadata: dict[str, Any] | None = None,
    extra: dict[str, Tensor] | None = None,
) -> None:
    """Writes `tensors` of the model in `folder`. `metadata` and `extra` are added as they are."""
    spec = describe_model(folder).spec
    writer = gguf.GGUFWriter(path, kind)
    _sizes(writer, spec)
    if tokenizer is not None:
        _vocabulary(writer, tokenizer, split)
    for key, value in (metadata or {}).items():
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        else:
            writer.add_uint32(key, value)
    attention = spec.blocks[0].attention
    for name, value in tensors.items():
        array = value.float().numpy()
        if kind == "llama" and ("q_proj" in name or "k_proj" in name):
            heads = attention.query_heads if "q_proj" in name else attention.kv_heads
            array = _permuted(array, heads)
        _add(writer, gguf_name(name), array, "F32" if array.ndim == 1 else type_of(name))
    for name, value in (extra or {}).items():
        _add(writer, name, value.float().numpy(), "F32")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_name(name: str) -> str:
    """The file's name of a checkpoint's tensor."""
    whole = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    if name in whole:
        return whole[name]
    _, _, layer, rest = name.split(".", 3)
    part, _, suffix = rest.rpartition(".")
    return f"blk.{layer}.{BLOCK_NAMES[part]}.{suffix}"


def meant(name: str, value: Tensor, kind: str) -> Tensor:
    """What a tensor is after ggml has quantized it, float32."""
    raw = quantize(value.float().numpy(), GGMLQuantizationType[kind])
    return torch.from_numpy(gguf.dequantize(raw, GGMLQuantizationType[kind]))


def _permuted(array: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """As convert_hf_to_gguf.py's LlamaModel.permute."""
    shape = (heads, 2, array.shape[0] // heads // 2, *array.shape[1:])
    return array.reshape(shape).swapaxes(1, 2).reshape(array.shape)


def _add(writer: gguf.GGUFWriter, name: str, array: np.ndarray[Any, Any], kind: str) -> None:
    if kind == "F32":
        writer.add_tensor(name, np.ascontiguousarray(array, dtype=np.float32))
    elif kind == "F16":
        writer.add_tensor(name, np.ascontiguousarray(array, dtype=np.float16))
    else:
        of = GGMLQuantizationType[kind]
        writer.add_tensor(name, quantize(np.ascontiguousarray(array, dtype=np.float32), of), raw_dtype=of)


def _sizes(writer: gguf.GGUFWriter, spec: ModelSpec) -> None:
    attention = spec.blocks[0].attention
    writer.add_context_length(spec.max_sequence_tokens)
    writer.add_embedding_length(spec.hidden_size)
    writer.add_block_count(len(spec.blocks))
    writer.add_feed_forward_length(spec.blocks[0].mlp.inner_size)
    writer.add_head_count(attention.query_heads)
    writer.add_head_count_kv(attention.kv_heads)
    writer.add_key_length(attention.head_dim)
    writer.add_value_length(attention.head_dim)
    writer.add_layer_norm_rms_eps(spec.norm.epsilon)
    writer.add_rope_freq_base(attention.rope.theta)
    writer.add_rope_dimension_count(attention.head_dim)


def gguf_tokenizer(pattern: str = LLAMA3_PATTERN) -> Tokenizer:
    """Byte-level BPE of 320 tokens, three of them control tokens."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|begin|>", "<|end|>", "<|turn|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*TEXTS, "the fox and the apples " * 20, "counting 123 456 " * 9], trainer)
    return tokenizer


def _vocabulary(writer: gguf.GGUFWriter, tokenizer: Tokenizer, split: str) -> None:

    definition = json.loads(tokenizer.to_str())
    vocabulary = definition["model"]["vocab"]
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    special = {entry["content"] for entry in definition["added_tokens"]}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in special else 1 for token in tokens])
    writer.add_token_merges([" ".join(merge) for merge in definition["model"]["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_chat_template("{% for m in messages %}<|turn|>{{ m['content'] }}{% endfor %}")
