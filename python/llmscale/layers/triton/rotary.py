"""Norms and rotation of query and key heads, and the writing of keys and values to their slots, in one pass.

A program takes four heads of one row. It reads each element of the fused projection once and writes it once: the query
to its buffer, key and value into the paged region. A row past the step's last one (the padding of a captured graph)
writes nothing. It does not know who chose the slots.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from llmscale.layers.ops import AttentionConstants, KvLayer, StepRows
from llmscale.layers.triton.launch import FUSED, blocks_of, padded, require_dense

HEADS = 4
"""Heads of a program: 1 KiB of bfloat16 at 128 elements, four 16-byte loads per thread of one warp and half of that."""


@triton.jit
def normed_halves(first, second, weight, at, inside, epsilon, half: tl.constexpr):
    """RMS norm of heads [heads, D] that are given as two halves, rounded as `layers/norm.py` rounds."""
    wide_first, wide_second = first.to(tl.float32), second.to(tl.float32)
    squares = tl.sum(wide_first * wide_first, 1) + tl.sum(wide_second * wide_second, 1)
    factor = tl.rsqrt(squares / (2 * half) + epsilon)[:, None]
    weight_first = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)[None, :]
    weight_second = tl.load(weight + half + at, mask=inside, other=0.0).to(tl.float32)[None, :]
    normed_first = (wide_first * factor).to(first.dtype).to(tl.float32) * weight_first
    normed_second = (wide_second * factor).to(second.dtype).to(tl.float32) * weight_second
    return normed_first.to(first.dtype), normed_second.to(second.dtype)


@triton.jit
def rotated_halves(first, second, cosines, sines, inside):
    """Rotates element i of every head with element i + D/2, in float32, rounded once."""
    cosine = tl.load(cosines, mask=inside, other=0.0)[None, :]
    sine = tl.load(sines, mask=inside, other=0.0)[None, :]
    wide_first, wide_second = first.to(tl.float32), second.to(tl.float32)
    turned_first = (wide_first * cosine - wide_second * sine).to(first.dtype)
    return turned_first, (wide_second * cosine + wide_first * sine).to(second.dtype)


@triton.jit(do_not_specialize=["sequences", "layer"])
def rotate_and_store_kernel(
    qkv,
    query_norm,
    key_norm,
    cosines,
    sines,
    positions,
    slot_mapping,
    query_start,
    query,
    region,
    epsilon,
    sequences,
    layer,
    layers: tl.constexpr,
    query_heads: tl.constexpr,
    kv_heads: tl.constexpr,
    block_tokens: tl.constexpr,
    head_dim: tl.constexpr,
    padded_half: tl.constexpr,
    heads: tl.constexpr,
):
    """Grid (T, pieces of query heads, then of key heads, then of value heads). The norms may be None."""
    row = tl.program_id(0)
    if row >= tl.load(query_start + sequences):
        return
    piece = tl.program_id(1)
    half: tl.constexpr = head_dim // 2
    query_pieces: tl.constexpr = (query_heads + heads - 1) // heads
    kv_pieces: tl.constexpr = (kv_heads + heads - 1) // heads
    is_query = piece < query_pieces
    is_rotated = piece < query_pieces + kv_pieces
    # The heads of this program: counted within their kind, and in the row of the fused projection.
    first_piece = tl.where(is_query, 0, tl.where(is_rotated, query_pieces, query_pieces + kv_pieces))
    first_head = tl.where(is_query, 0, tl.where(is_rotated, query_heads, query_heads + kv_heads))
    head = (piece - first_piece) * heads + tl.arange(0, heads)
    at = tl.arange(0, padded_half)
    inside = at < half
    present = (head < tl.where(is_query, query_heads, kv_heads))[:, None] & inside[None, :]
    source = (row.to(tl.int64) * (query_heads + 2 * kv_heads) + first_head + head)[:, None] * head_dim + at[None, :]
    first = tl.load(qkv + source, mask=present, other=0.0)
    second = tl.load(qkv + source + half, mask=present, other=0.0)
    if is_rotated:
        if query_norm is not None:
            if is_query:
                first, second = normed_halves(first, second, query_norm, at, inside, epsilon, half)
            else:
                first, second = normed_halves(first, second, key_norm, at, inside, epsilon, half)
        turn = tl.load(positions + row).to(tl.int64) * half + at
        first, second = rotated_halves(first, second, cosines + turn, sines + turn, inside)
    if is_query:
        target = (row.to(tl.int64) * query_heads + head)[:, None] * head_dim + at[None, :]
        tl.store(query + target, first, mask=present)
        tl.store(query + target + half, second, mask=present)
    else:
        slot = tl.load(slot_mapping + row)
        part = (slot // block_tokens).to(tl.int64) * layers + layer
        kind = tl.where(is_rotated, 0, 1)
        line = ((part * 2 + kind) * kv_heads + head) * block_tokens + slot % block_tokens
        target = line[:, None] * head_dim + at[None, :]
        tl.store(region + target, first, mask=present)
        tl.store(region + target + half, second, mask=present)


def launch_rotate_and_store(
    qkv: Tensor, attention: AttentionConstants, rows: StepRows, kv: KvLayer, query: Tensor
) -> None:
    """See `Ops.rotate_and_store`."""
    spec, norms, rope = attention.spec, attention.norms, attention.rope
    require_dense(qkv=qkv, query=query, cosines=rope.cosines, sines=rope.sines, region=kv.region)
    assert 2 * rope.cosines.shape[1] == spec.head_dim, (rope.cosines.shape, spec.head_dim)
    _, layers, _, kv_heads, block_tokens, head_dim = kv.region.shape
    assert (kv_heads, head_dim) == (spec.kv_heads, spec.head_dim), (kv.region.shape, spec.kv_heads, spec.head_dim)
    pieces = blocks_of(spec.query_heads, HEADS) + 2 * blocks_of(kv_heads, HEADS)
    rotate_and_store_kernel[(rows.positions.shape[0], pieces)](
        qkv,
        None if norms is None else norms.query,
        None if norms is None else norms.key,
        rope.cosines,
        rope.sines,
        rows.positions,
        rows.slot_mapping,
        rows.query_start,
        query,
        kv.region,
        0.0 if norms is None else norms.epsilon,
        rows.sequence_lengths.shape[0],
        kv.layer,
        layers,
        spec.query_heads,
        kv_heads,
        block_tokens,
        head_dim,
        padded(head_dim // 2),
        HEADS,
        num_warps=1,
        **FUSED,
    )
