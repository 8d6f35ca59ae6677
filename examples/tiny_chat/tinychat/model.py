"""The Llama architecture in plain torch, exactly as transformers computes it, for ragged training batches and decoding.

Training runs every linear layer over one flat list of tokens and splits only attention into groups of rows of equal
length, so that short answers cost no padding to long ones. A token costs 2 FLOPs per parameter, 6 with backward.
`LlamaWeights` names equal the Hugging Face checkpoint's. Knows nothing of tasks, optimizers or files.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Dimensions of a Llama-style model with tied embeddings; head_dim is hidden / heads."""

    vocabulary: int = 2048
    hidden: int = 256
    layers: int = 6
    heads: int = 8
    kv_heads: int = 4
    head_dim: int = 32
    intermediate: int = 512
    max_positions: int = 2048
    rope_theta: float = 10000.0
    norm_epsilon: float = 1e-5


SHAPES = {
    "tiny-chat": ModelShape(),
    "tiny-chat-mini": ModelShape(hidden=128, layers=5, heads=4, kv_heads=2, head_dim=32, intermediate=320),
}


@dataclass(frozen=True, slots=True)
class RowGroup:
    """Rows of one length inside a flat batch: tokens [start, start + rows * length)."""

    start: int
    rows: int
    length: int


def rope_tables(shape: ModelShape, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines, float32 [positions, head_dim], halves repeated as in transformers (rotate-half form)."""
    frequencies = 1.0 / shape.rope_theta ** (torch.arange(0, shape.head_dim, 2, dtype=torch.float32) / shape.head_dim)
    angles = positions.float()[:, None] * frequencies
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary position embedding to x [..., head_dim]; cos and sin broadcast against it."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """RMSNorm with float32 statistics."""
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)).to(x.dtype)


class Attention(nn.Module):
    """Grouped-query causal attention over the row groups of a flat batch."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.shape = shape
        self.q_proj = nn.Linear(shape.hidden, shape.heads * shape.head_dim, bias=False)
        self.k_proj = nn.Linear(shape.hidden, shape.kv_heads * shape.head_dim, bias=False)
        self.v_proj = nn.Linear(shape.hidden, shape.kv_heads * shape.head_dim, bias=False)
        self.o_proj = nn.Linear(shape.heads * shape.head_dim, shape.hidden, bias=False)

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries [tokens, heads, head_dim], rotated keys and values [tokens, kv_heads, head_dim]."""
        q = self.q_proj(x).unflatten(-1, (self.shape.heads, self.shape.head_dim))
        k = self.k_proj(x).unflatten(-1, (self.shape.kv_heads, self.shape.head_dim))
        v = self.v_proj(x).unflatten(-1, (self.shape.kv_heads, self.shape.head_dim))
        return rotate(q, cos, sin), rotate(k, cos, sin), v

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, groups: tuple[RowGroup, ...]) -> Tensor:
        q, k, v = self.project(x, cos, sin)
        repeat = self.shape.heads // self.shape.kv_heads
        k, v = k.repeat_interleave(repeat, dim=1), v.repeat_interleave(repeat, dim=1)
        outputs = []
        for group in groups:
            span = slice(group.start, group.start + group.rows * group.length)
            rows = [t[span].reshape(group.rows, group.length, *t.shape[1:]).transpose(1, 2) for t in (q, k, v)]
            mixed = F.scaled_dot_product_attention(rows[0], rows[1], rows[2], is_causal=True)
            outputs.append(mixed.transpose(1, 2).flatten(0, 1).flatten(1))
        joined: Tensor = self.o_proj(torch.cat(outputs))
        return joined


class Mlp(nn.Module):
    """Gated SiLU feed-forward."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden, shape.intermediate, bias=False)
        self.up_proj = nn.Linear(shape.hidden, shape.intermediate, bias=False)
        self.down_proj = nn.Linear(shape.intermediate, shape.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        mixed: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return mixed


class Norm(nn.Module):
    """RMSNorm with a learned scale."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(shape.hidden))
        self.epsilon = shape.norm_epsilon

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.epsilon)


class Layer(nn.Module):
    """Pre-norm attention and feed-forward with residuals."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.input_layernorm = Norm(shape)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = Norm(shape)
        self.mlp = Mlp(shape)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, groups: tuple[RowGroup, ...]) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, groups)
        output: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return output


class Body(nn.Module):
    """Embedding, layers and final norm: everything but the (tied) head."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocabulary, shape.hidden)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.norm = Norm(shape)

    def blocks(self) -> Iterator[Layer]:
        """The layers in order, typed (a ModuleList yields Module)."""
        for layer in self.layers:
            assert isinstance(layer, Layer)
            yield layer

    def forward(self, ids: Tensor, cos: Tensor, sin: Tensor, groups: tuple[RowGroup, ...]) -> Tensor:
        x = self.embed_tokens(ids)
        for layer in self.blocks():
            x = layer(x, cos, sin, groups)
        normed: Tensor = self.norm(x)
        return normed


class LlamaWeights(nn.Module):
    """A causal language model; `state_dict` names equal LlamaForCausalLM's without the tied `lm_head`."""

    def __init__(self, shape: ModelShape, seed: int = 0) -> None:
        super().__init__()
        self.shape = shape
        self.model = Body(shape)
        generator = torch.Generator().manual_seed(seed)
        residual = 1.0 / math.sqrt(2 * shape.layers)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                std = 0.02 if "embed" in name else parameter.shape[1] ** -0.5 * 0.7
                if name.endswith(("o_proj.weight", "down_proj.weight")):
                    std *= residual
                with torch.no_grad():
                    parameter.normal_(0.0, std, generator=generator)

    def forward(self, ids: Tensor, cos: Tensor, sin: Tensor, groups: tuple[RowGroup, ...]) -> Tensor:
        """Final hidden states [tokens, hidden] of a flat batch; cos and sin are [tokens, 1, head_dim]."""
        hidden: Tensor = self.model(ids, cos, sin, groups)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """Float32 logits [..., vocabulary] through the tied embedding."""
        return F.linear(hidden, self.model.embed_tokens.weight).float()
