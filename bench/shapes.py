"""Models of fixed shapes with random weights: what the arithmetic costs does not depend on what they say.

Each is a Hugging Face folder (config.json, model.safetensors, tokenizer.json) made once from a seed and kept in a cache
folder outside the repository, so that every runtime reads the same files. The tokenizer has one made-up word per id;
benchmarks send ids. O(parameters).
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SEED = 0
ROPE_THETA = 100_000.0
MAX_POSITIONS = 8_192


@dataclass(frozen=True, slots=True)
class Shape:
    """A Llama-style model with tied embeddings in bfloat16."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    ffn: int
    vocabulary: int
    own_head_size: int | None = None
    """Where it is not the width divided by the heads."""

    @property
    def head_size(self) -> int:
        """Elements of one head."""
        return self.own_head_size or self.hidden // self.heads

    @property
    def layer_parameters(self) -> int:
        """Weights that every token passes besides the head: all linear layers."""
        attention = self.hidden * self.head_size * (2 * self.heads + 2 * self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.ffn)

    @property
    def head_parameters(self) -> int:
        """Weights of the head, which are the embedding's too."""
        return self.hidden * self.vocabulary


SHAPES = {
    "tiny": Shape(2, 64, 2, 1, 128, 32_000),
    "S": Shape(30, 576, 9, 3, 1_536, 49_152),
    "M": Shape(24, 896, 14, 2, 4_864, 32_000),
    "L": Shape(16, 2_048, 32, 8, 8_192, 32_000),
    "odd": Shape(48, 320, 6, 2, 864, 50_257, own_head_size=48),
    "8B": Shape(32, 4_096, 32, 8, 14_336, 128_256),
}


def cache_folder() -> Path:
    """Where made models lie: LLMSCALE_BENCH_CACHE, else the user's cache."""
    given = os.environ.get("LLMSCALE_BENCH_CACHE")
    return Path(given) if given else Path.home() / ".cache" / "llmscale-bench"


def model_folder(name: str) -> Path:
    """The folder of a shape, made if it is not there yet."""
    shape = SHAPES[name]
    folder = cache_folder() / f"{name}-seed{SEED}"
    if (folder / "config.json").is_file():
        return folder
    making = folder.with_name(f"{folder.name}.{os.getpid()}.part")
    making.mkdir(parents=True)
    _write_weights(shape, making)
    _write_tokenizer(shape, making)
    (making / "generation_config.json").write_text('{"eos_token_id": 0}')
    (making / "config.json").write_text(json.dumps(config_of(shape), indent=1))
    if folder.exists():
        shutil.rmtree(folder)
    # Renamed when complete: a run that was interrupted leaves no folder that looks whole.
    making.rename(folder)
    return folder


def config_of(shape: Shape) -> dict[str, Any]:
    """The config.json of a shape."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.ffn,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_size,
        "vocab_size": shape.vocabulary,
        "max_position_embeddings": MAX_POSITIONS,
        "rms_norm_eps": 1e-5,
        "rope_theta": ROPE_THETA,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": 0,
        "eos_token_id": 0,
    }


def _write_weights(shape: Shape, folder: Path) -> None:
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(SEED)

    def random(rows: int, columns: int) -> torch.Tensor:
        # Scaled like a trained model's, so that activations neither vanish nor overflow in bfloat16.
        return (torch.randn(rows, columns, generator=generator) * 0.02).to(torch.bfloat16)

    hidden, query, kv = shape.hidden, shape.heads * shape.head_size, shape.kv_heads * shape.head_size
    tensors = {
        "model.embed_tokens.weight": random(shape.vocabulary, hidden),
        "model.norm.weight": torch.ones(hidden, dtype=torch.bfloat16),
    }
    for layer in range(shape.layers):
        prefix = f"model.layers.{layer}"
        for name, rows, columns in (
            ("self_attn.q_proj", query, hidden),
            ("self_attn.k_proj", kv, hidden),
            ("self_attn.v_proj", kv, hidden),
            ("self_attn.o_proj", hidden, query),
            ("mlp.gate_proj", shape.ffn, hidden),
            ("mlp.up_proj", shape.ffn, hidden),
            ("mlp.down_proj", hidden, shape.ffn),
        ):
            tensors[f"{prefix}.{name}.weight"] = random(rows, columns)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}.{name}.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _write_tokenizer(shape: Shape, folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    words = {"<eos>": 0, "<unk>": 1} | {f"w{token}": token for token in range(2, shape.vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    tokenizer.add_special_tokens(["<eos>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": "<eos>", "unk_token": "<unk>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
