"""One block of a model in float32, run over whole sequences, with the inputs of each of its products at hand.

Weights are fused as a spec has them and may be replaced between two runs. Causal attention over padded batches: padding
stands at the end, so that no token sees it. It exists to be exact and simple; an executor is what serves. Memory is one
block's weights and one batch. It does not know quantization.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor
from torch.nn import functional as F

from llmscale.layers.attention import split_heads
from llmscale.layers.mlp import silu_mul
from llmscale.layers.norm import rms_norm
from llmscale.layers.ops import RopeTable
from llmscale.layers.rotary import rotate
from llmscale.models.spec import BlockSpec, LinearSpec, NormSpec


class Product(Enum):
    """The products of a block, in the order of computation."""

    QKV = "qkv"
    OUTPUT = "output"
    GATE_UP = "gate_up"
    DOWN = "down"


@dataclass(frozen=True, slots=True)
class HiddenBatch:
    """Sequences on their way through a model: hidden [B, T, H] float32, of which the first `lengths[i]` tokens of row i
    are text and the rest is padding."""

    hidden: Tensor
    lengths: tuple[int, ...]

    def tokens(self, values: Tensor) -> Tensor:
        """Those of [B, T, K] that belong to text, [tokens, K]."""
        longest = torch.arange(values.shape[1])
        return values[longest[None, :] < torch.tensor(self.lengths)[:, None]]


class DenseBlock:
    """A block and its weights by the names of their specs, float32."""

    def __init__(self, spec: BlockSpec, weights: dict[str, Tensor], rope: RopeTable) -> None:
        self.spec = spec
        self.weights = weights
        self._rope = rope

    def linear(self, product: Product) -> LinearSpec:
        """The spec of a product."""
        return {
            Product.QKV: self.spec.attention.qkv,
            Product.OUTPUT: self.spec.attention.output,
            Product.GATE_UP: self.spec.mlp.gate_up,
            Product.DOWN: self.spec.mlp.down,
        }[product]

    def inputs(self, product: Product, hidden: Tensor) -> Tensor:
        """What a product gets, [B, T, K], when the block gets `hidden` [B, T, H]."""
        if product is Product.QKV:
            return self._norm(self.spec.attention_norm, hidden)
        if product is Product.OUTPUT:
            return self._heads(self._apply(Product.QKV, self.inputs(Product.QKV, hidden)))
        return self._mlp_inputs(product, self._after_attention(hidden))

    def all_inputs(self, hidden: Tensor) -> dict[Product, Tensor]:
        """The same for all products in one run."""
        qkv = self.inputs(Product.QKV, hidden)
        heads = self._heads(self._apply(Product.QKV, qkv))
        middle = hidden + self._apply(Product.OUTPUT, heads)
        gate_up = self._mlp_inputs(Product.GATE_UP, middle)
        inner = self._mlp_inputs(Product.DOWN, middle)
        return {Product.QKV: qkv, Product.OUTPUT: heads, Product.GATE_UP: gate_up, Product.DOWN: inner}

    def forward(self, hidden: Tensor) -> Tensor:
        """The block's output [B, T, H]."""
        middle = self._after_attention(hidden)
        return middle + self._apply(Product.DOWN, self._mlp_inputs(Product.DOWN, middle))

    def _after_attention(self, hidden: Tensor) -> Tensor:
        return hidden + self._apply(Product.OUTPUT, self.inputs(Product.OUTPUT, hidden))

    def _mlp_inputs(self, product: Product, middle: Tensor) -> Tensor:
        normed = self._norm(self.spec.mlp_norm, middle)
        if product is Product.GATE_UP:
            return normed
        gate_up = self._apply(Product.GATE_UP, normed)
        return silu_mul(gate_up.flatten(0, 1)).view(*middle.shape[:2], -1)

    def _apply(self, product: Product, x: Tensor) -> Tensor:
        linear = self.linear(product)
        bias = None if linear.bias is None else self.weights[linear.bias.name]
        return F.linear(x, self.weights[linear.weight.name], bias)

    def _norm(self, spec: NormSpec, x: Tensor) -> Tensor:
        return rms_norm(x, self.weights[spec.weight.name], spec.epsilon)

    def _heads(self, qkv: Tensor) -> Tensor:
        """Attention [B, T, (Q + 2 K) D] to [B, T, Q D]."""
        spec, (batch, tokens) = self.spec.attention, qkv.shape[:2]
        query, key, value = split_heads(qkv.flatten(0, 1), spec)
        if spec.query_norm is not None and spec.key_norm is not None:
            query, key = self._norm(spec.query_norm, query), self._norm(spec.key_norm, key)
        positions = torch.arange(tokens).repeat(batch)
        query, key = rotate(query, self._rope, positions), rotate(key, self._rope, positions)
        query, key, value = (
            part.reshape(batch, tokens, -1, spec.head_dim).transpose(1, 2) for part in (query, key, value)
        )
        mask = None
        if spec.window_tokens is not None:
            distance = torch.arange(tokens)[:, None] - torch.arange(tokens)[None, :]
            mask = (distance >= 0) & (distance < spec.window_tokens)
        heads: Tensor = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, scale=spec.scale, enable_gqa=True
        )
        return heads.transpose(1, 2).flatten(2)
