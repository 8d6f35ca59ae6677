"""Batched greedy decoding with a KV cache, for rows of one prompt length.

Rows of equal length need no mask and no padding; callers group prompts by length. A batch costs one prefill and one
step per generated token until every row has ended. float32 throughout, so that the result is one fixed reference.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from tinychat.model import LlamaWeights, rope_tables


class _Cache:
    """Keys and values of all layers, [rows, heads, positions, head_dim], grown by concatenation."""

    def __init__(self, layers: int) -> None:
        self.keys: list[Tensor | None] = [None] * layers
        self.values: list[Tensor | None] = [None] * layers

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        old_key, old_value = self.keys[layer], self.values[layer]
        if old_key is not None and old_value is not None:
            key, value = torch.cat((old_key, key), dim=2), torch.cat((old_value, value), dim=2)
        self.keys[layer], self.values[layer] = key, value
        return key, value


def _forward(weights: LlamaWeights, ids: Tensor, start: int, cache: _Cache) -> Tensor:
    """Hidden states [rows, tokens, hidden] of ids [rows, tokens] at positions from `start`."""
    tokens = ids.shape[1]
    shape = weights.shape
    cos, sin = rope_tables(shape, torch.arange(start, start + tokens))
    cos, sin = (t[:, None].to(weights.model.norm.weight.dtype) for t in (cos, sin))
    x = weights.model.embed_tokens(ids)
    repeat = shape.heads // shape.kv_heads
    for place, layer in enumerate(weights.model.blocks()):
        q, k, v = layer.self_attn.project(layer.input_layernorm(x), cos, sin)
        k, v = cache.append(place, k.transpose(1, 2), v.transpose(1, 2))
        wide_k, wide_v = k.repeat_interleave(repeat, dim=1), v.repeat_interleave(repeat, dim=1)
        mixed = F.scaled_dot_product_attention(q.transpose(1, 2), wide_k, wide_v, is_causal=tokens > 1)
        x = x + layer.self_attn.o_proj(mixed.transpose(1, 2).flatten(2))
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    normed: Tensor = weights.model.norm(x)
    return normed


@torch.no_grad()
def greedy(weights: LlamaWeights, prompts: Tensor, max_new_tokens: int, stop_ids: tuple[int, ...]) -> list[list[int]]:
    """Greedy continuations of prompts int64 [rows, tokens], each without its stop token."""
    cache = _Cache(weights.shape.layers)
    hidden = _forward(weights, prompts, 0, cache)[:, -1]
    outputs: list[list[int]] = [[] for _ in range(prompts.shape[0])]
    running = [True] * prompts.shape[0]
    length = prompts.shape[1]
    for _ in range(max_new_tokens):
        chosen = weights.logits(hidden).argmax(-1)
        for row, token in enumerate(chosen.tolist()):
            if running[row] and token in stop_ids:
                running[row] = False
            elif running[row]:
                outputs[row].append(token)
        if not any(running):
            break
        hidden = _forward(weights, chosen[:, None], length, cache)[:, -1]
        length += 1
    return outputs
