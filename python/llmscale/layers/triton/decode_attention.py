"""Attention of one row per sequence over its paged keys and values: split over the context, then merged.

Few sequences cannot fill a device, so each context is cut into parts that are attended to side by side, and a second
kernel merges them by their log-sum-exp (Flash-Decoding, Dao et al. 2023). The query heads that share a KV head form one
tile, padded to the 16 rows of a tensor core's product. Reads each key and value once; the number of parts follows from
the step's capacities and the device alone, how long each part is from lengths on the device. Sequences with no row or
with several are left to others. It does not know chunks.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from llmscale.layers.ops import AttentionConstants, KvLayer, StepRows
from llmscale.layers.triton.key_range import attend_to_range
from llmscale.layers.triton.launch import FUSED, padded, products_in_float32
from llmscale.layers.triton.tiling import DecodeTiling

LOG2_E = 1.4426950408889634
MIN_PRODUCT_ROWS = 16
"""Rows of the smallest product that tensor cores take."""


@triton.jit(do_not_specialize=["layer"])
def decode_kernel(
    query,
    region,
    query_start,
    sequence_lengths,
    table_offsets,
    block_tables,
    out,
    partial,
    partial_weight,
    scale,
    layer,
    layers: tl.constexpr,
    kv_heads: tl.constexpr,
    group: tl.constexpr,
    padded_group: tl.constexpr,
    block_tokens: tl.constexpr,
    head_dim: tl.constexpr,
    padded_dim: tl.constexpr,
    window: tl.constexpr,
    widen: tl.constexpr,
    parts: tl.constexpr,
    min_part_tiles: tl.constexpr,
    tile: tl.constexpr,
):
    """Grid (K, parts, S). One part writes to `out` [T, Q, D]; several write `partial` [S, Q, parts, D] and
    `partial_weight` [S, Q, parts], the logarithm to base 2 of a part's sum, -inf for a part without keys."""
    kv_head, part, sequence = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row = tl.load(query_start + sequence)
    if tl.load(query_start + sequence + 1) - row != 1:
        return
    length = tl.load(sequence_lengths + sequence)
    first_tile = 0
    if window is not None:
        first_tile = tl.maximum(length - window, 0) // tile
    part_tiles = tl.maximum(tl.cdiv(tl.cdiv(length, tile) - first_tile, parts), min_part_tiles)
    begin = (first_tile + part * part_tiles) * tile
    end = tl.minimum(begin + part_tiles * tile, length)
    head = tl.arange(0, padded_group)
    element = tl.arange(0, padded_dim)
    lines = kv_head * group + head
    there = (head < group)[:, None] & (element < head_dim)[None, :]
    queries: tl.constexpr = kv_heads * group
    at = (row.to(tl.int64) * queries + lines)[:, None] * head_dim + element[None, :]
    rows = tl.load(query + at, mask=there, other=0.0)
    if widen:
        rows = rows.to(tl.float32)
    block_distance: tl.constexpr = layers * 2 * kv_heads * block_tokens * head_dim
    keys = region + (layer.to(tl.int64) * (2 * kv_heads) + kv_head) * (block_tokens * head_dim)
    maximum, total, weighted = attend_to_range(
        rows, tl.full([padded_group], 0, tl.int32) + (length - 1), tl.full([padded_group], float("-inf"), tl.float32),
        tl.zeros([padded_group], tl.float32), tl.zeros([padded_group, padded_dim], tl.float32), keys,
        block_tables + tl.load(table_offsets + sequence), begin, end, length, scale, window, widen,
        kv_heads * block_tokens * head_dim, block_distance, block_tokens, head_dim, tile, masked=True,
    )  # fmt: skip
    if parts == 1:
        result = weighted / total[:, None]
        tl.store(out + at, result.to(out.dtype.element_ty), mask=there)
    else:
        slot = (sequence.to(tl.int64) * queries + lines) * parts + part
        tl.store(partial_weight + slot, maximum + tl.log2(total), mask=head < group)
        tl.store(partial + slot[:, None] * head_dim + element[None, :], weighted / total[:, None], mask=there)


@triton.jit
def merge_kernel(
    partial,
    partial_weight,
    query_start,
    out,
    queries: tl.constexpr,
    head_dim: tl.constexpr,
    padded_dim: tl.constexpr,
    parts: tl.constexpr,
):
    """Grid (Q, S): the mean of the parts, weighted by their sums, into `out` [T, Q, D]."""
    line, sequence = tl.program_id(0), tl.program_id(1)
    row = tl.load(query_start + sequence)
    if tl.load(query_start + sequence + 1) - row != 1:
        return
    part = tl.arange(0, parts)
    element = tl.arange(0, padded_dim)
    inside = element < head_dim
    slot = (sequence.to(tl.int64) * queries + line) * parts + part
    weight = tl.load(partial_weight + slot)
    share = tl.exp2(weight - tl.max(weight, 0))
    # A part without keys has written NaN or nothing, and its share is 0.
    there = (weight > float("-inf"))[:, None] & inside[None, :]
    values = tl.load(partial + slot[:, None] * head_dim + element[None, :], mask=there, other=0.0)
    result = tl.sum(values * share[:, None], 0) / tl.sum(share, 0)
    at = (row.to(tl.int64) * queries + line) * head_dim + element
    tl.store(out + at, result.to(out.dtype.element_ty), mask=inside)


class PartialResults:
    """Room for the parts of a step's decodes: float32 values `[S Q parts D]` and weights `[S Q parts]`, flat."""

    __slots__ = ("values", "weights")

    def __init__(self, values: Tensor, weights: Tensor) -> None:
        self.values = values
        self.weights = weights


def launch_decode(
    query: Tensor,
    attention: AttentionConstants,
    rows: StepRows,
    kv: KvLayer,
    out: Tensor,
    tiling: DecodeTiling,
    room: PartialResults,
) -> None:
    """Attends for every sequence of the step with exactly one row; the rows of others are not touched."""
    spec, region = attention.spec, kv.region
    sequences = rows.sequence_lengths.shape[0]
    parts = tiling.parts(sequences)
    assert parts == 1 or sequences * spec.query_heads * parts <= room.weights.numel(), (sequences, parts)
    group = spec.query_heads // spec.kv_heads
    decode_kernel[(spec.kv_heads, parts, sequences)](
        query,
        region,
        rows.query_start,
        rows.sequence_lengths,
        rows.table_offsets,
        rows.block_tables,
        out,
        room.values,
        room.weights,
        spec.scale * LOG2_E,
        kv.layer,
        region.shape[1],
        spec.kv_heads,
        group,
        max(MIN_PRODUCT_ROWS, padded(group)),
        region.shape[4],
        spec.head_dim,
        padded(spec.head_dim),
        spec.window_tokens,
        products_in_float32(query.dtype),
        parts,
        tiling.min_part_tiles,
        tiling.tile,
        num_warps=tiling.warps,
        num_stages=tiling.stages,
        **FUSED,
    )
    if parts > 1:
        merge_kernel[(spec.query_heads, sequences)](
            room.values,
            room.weights,
            rows.query_start,
            out,
            spec.query_heads,
            spec.head_dim,
            padded(spec.head_dim),
            parts,
            num_warps=4,
            **FUSED,
        )
