"""Writes a made Llama checkpoint (`bench.shapes`) as a bfloat16 GGUF file, for llama.cpp: the same weights, unrounded.

Rows of the query and key projections change their order, because llama.cpp rotates neighbours where Hugging Face
rotates halves. The tokenizer is written as byte pairs with one merge that nothing uses: benchmarks send ids.
O(parameters).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_gguf(folder: Path, target: Path) -> None:
    """Of a folder in bfloat16 with tied embeddings and a word-level tokenizer."""
    import gguf
    import torch
    from safetensors.torch import load_file

    config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    writer = gguf.GGUFWriter(target, "llama")
    _describe(writer, config, folder)
    heads = {"self_attn.q_proj": config["num_attention_heads"], "self_attn.k_proj": config["num_key_value_heads"]}
    for name, stored in sorted(load_file(folder / "model.safetensors").items()):
        own, part = own_name(name)
        tensor = neighbours(stored, heads[part]) if part in heads else stored
        if tensor.ndim == 1:
            writer.add_tensor(own, tensor.float().numpy())
        else:
            raw = tensor.contiguous().view(torch.uint8).numpy()
            writer.add_tensor(own, raw, raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def own_name(name: str) -> tuple[str, str]:
    """llama.cpp's name of a tensor, and its part within a layer (empty outside of layers)."""
    outside = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    if name in outside:
        return outside[name], ""
    layer, _, part = name.removeprefix("model.layers.").removesuffix(".weight").partition(".")
    return f"blk.{layer}.{_LAYER_NAMES[part]}.weight", part


def neighbours(weight: Any, heads: int) -> Any:
    """The rows of each head, [first half, second half], as pairs of one of each. `weight` is [heads x head, inputs]."""
    rows, inputs = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, inputs).transpose(1, 2).reshape(rows, inputs)


def _describe(writer: Any, config: dict[str, Any], folder: Path) -> None:
    import gguf

    vocabulary = config["vocab_size"]
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(vocabulary)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    words = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    names = {token: word for word, token in words.items()}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([names.get(token, f"<pad{token}>") for token in range(vocabulary)])
    kinds = [gguf.TokenType.CONTROL if token < 2 else gguf.TokenType.NORMAL for token in range(vocabulary)]
    writer.add_token_types(kinds)
    writer.add_token_merges(["w 2"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_add_bos_token(False)
