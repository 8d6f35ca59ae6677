"""Writes a trained model as a Hugging Face folder: config, bfloat16 safetensors, tokenizer, chat template, card.

The folder loads with transformers' LlamaForCausalLM and AutoTokenizer without remote code. The card's table of results,
between its markers, is filled in by evaluate.py. Knows nothing of training.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer

from llmscale.embedded.tasks.item import TEST_ONE_IN
from tinychat.chat_format import CHAT_TEMPLATE, END, END_ID, END_OF_TEXT, END_OF_TEXT_ID, SPECIAL_TOKENS
from tinychat.checkpoint import Progress
from tinychat.model import LlamaWeights, ModelShape

RESULTS_BEGIN, RESULTS_END = "<!-- results begin -->", "<!-- results end -->"


def config_of(shape: ModelShape) -> dict[str, object]:
    """The content of config.json."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "max_position_embeddings": shape.max_positions,
        "rms_norm_eps": shape.norm_epsilon,
        "rope_theta": shape.rope_theta,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": [END_ID, END_OF_TEXT_ID],
        "pad_token_id": END_OF_TEXT_ID,
        "torch_dtype": "bfloat16",
    }


def _tokenizer_config(shape: ModelShape) -> dict[str, object]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END,
        "pad_token": END_OF_TEXT,
        "additional_special_tokens": list(SPECIAL_TOKENS),
        "model_max_length": shape.max_positions,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }


def export_folder(folder: Path, weights: LlamaWeights, tokenizer: Tokenizer, progress: Progress) -> None:
    """Write every file of the folder; an existing model card is replaced, because its figures are stale."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().to(torch.bfloat16).contiguous() for name, tensor in weights.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    # safetensors creates its file for the owner alone; an installed package is read by other users.
    (folder / "model.safetensors").chmod(0o644)
    tokenizer.save(str(folder / "tokenizer.json"))
    generation = {"eos_token_id": [END_ID, END_OF_TEXT_ID], "pad_token_id": END_OF_TEXT_ID, "do_sample": False}
    for name, content in (
        ("config.json", config_of(weights.shape)),
        ("tokenizer_config.json", _tokenizer_config(weights.shape)),
        ("generation_config.json", generation),
    ):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")
    (folder / "MODEL_CARD.md").write_text(model_card(weights.shape, progress))


def model_card(shape: ModelShape, progress: Progress) -> str:
    parameters = sum(p.numel() for p in LlamaWeights(shape).parameters())
    return f"""# {progress.model}

The embedded model of llmscale: a Llama-style causal language model with {parameters:,} parameters, trained from random
weights by `examples/tiny_chat/train.py` on text that the same folder generates. No text or weights were downloaded.
It exists so that the runtime works and can be measured without any download: its answers to generated questions are
either right or wrong, so the exact match shows what quantization, speculation, a cascade or distillation cost.

| | |
|---|---|
| layers, hidden, intermediate | {shape.layers}, {shape.hidden}, {shape.intermediate} |
| query heads, key/value heads, head size | {shape.heads}, {shape.kv_heads}, {shape.head_dim} |
| vocabulary | {shape.vocabulary} byte-level BPE tokens, digits single |
| positions | {shape.max_positions} (nearly all training rows are shorter than 256 tokens) |
| trained on | {progress.tokens:,} tokens, {progress.step:,} steps, {progress.seconds / 60:.0f} min on 2 CPU cores |
| seed | {progress.seed} |

## Exact match

Greedy answers to unseen items (one key in {TEST_ONE_IN} is never trained on, see `llmscale/embedded/tasks/item.py`).

{RESULTS_BEGIN}
not evaluated yet: run `examples/tiny_chat/evaluate.py --model` with this folder
{RESULTS_END}

## What it is not

It knows no language beyond the templates it was trained on, and no facts beyond a few hundred. Anything else gives
fluent nonsense. Wordings of arithmetic, sorting or conversion other than the trained ones usually fail, as do numbers
of more digits. What fails among the trained tasks is in the table: long lists lose or repeat an item, and a value from
an earlier turn is sometimes mistaken for another of its kind. Chats of more than four turns were not measured.
Do not use it for anything but tests, demonstrations and measurements.
"""
