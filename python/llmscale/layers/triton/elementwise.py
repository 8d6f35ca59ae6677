"""Lookup of token embeddings, and SiLU of a gate times its up projection.

Both move memory and compute nothing to speak of; a program takes a piece of one row, so that a single row of a decode
keeps several multiprocessors busy. Linear in the elements. It does not know layers.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from llmscale.layers.triton.launch import FUSED, blocks_of, padded, require_dense

MAX_PIECE = 1024
"""Elements of a row that one program takes: four 16-byte loads of bfloat16 in each thread of a warp."""


@triton.jit
def embed_kernel(token_ids, table, out, vocabulary, hidden: tl.constexpr, piece: tl.constexpr):
    """Grid (T, pieces). An id outside the vocabulary gives NaN, which the sampler reports as a broken row."""
    row = tl.program_id(0).to(tl.int64)
    token = tl.load(token_ids + row).to(tl.int64)
    element = tl.program_id(1) * piece + tl.arange(0, piece)
    inside = element < hidden
    if (token >= 0) & (token < vocabulary):
        tl.store(out + row * hidden + element, tl.load(table + token * hidden + element, mask=inside), mask=inside)
    else:
        tl.store(out + row * hidden + element, tl.full([piece], float("nan"), out.dtype.element_ty), mask=inside)


@triton.jit
def silu_mul_kernel(gate_up, out, inner: tl.constexpr, piece: tl.constexpr):
    """Grid (T, pieces): `gate_up` [T, 2 F], gate first, `out` [T, F]; float32 inside, rounded once."""
    row = tl.program_id(0).to(tl.int64)
    element = tl.program_id(1) * piece + tl.arange(0, piece)
    inside = element < inner
    gate = tl.load(gate_up + row * (2 * inner) + element, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * (2 * inner) + inner + element, mask=inside, other=0.0).to(tl.float32)
    result = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out + row * inner + element, result.to(out.dtype.element_ty), mask=inside)


def launch_embed(token_ids: Tensor, table: Tensor, out: Tensor) -> None:
    """See `Ops.embed`."""
    require_dense(token_ids=token_ids, table=table, out=out)
    rows, hidden = out.shape
    assert table.shape[1] == hidden, (table.shape, out.shape)
    piece = min(MAX_PIECE, padded(hidden))
    grid = (rows, blocks_of(hidden, piece))
    embed_kernel[grid](token_ids, table, out, table.shape[0], hidden, piece, num_warps=piece_warps(piece), **FUSED)


def launch_silu_mul(gate_up: Tensor, out: Tensor) -> None:
    """See `Ops.silu_mul`."""
    require_dense(gate_up=gate_up, out=out)
    rows, inner = out.shape
    assert gate_up.shape == (rows, 2 * inner), (gate_up.shape, out.shape)
    piece = min(MAX_PIECE, padded(inner))
    silu_mul_kernel[(rows, blocks_of(inner, piece))](gate_up, out, inner, piece, num_warps=piece_warps(piece), **FUSED)


def piece_warps(piece: int) -> int:
    """Warps with at least one 16-byte load of bfloat16 for every thread."""
    return max(1, min(4, piece // 256))
