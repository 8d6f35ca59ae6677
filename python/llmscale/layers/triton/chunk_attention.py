"""Causal attention of chunks of prompts over paged keys and values, all chunks of a step in one launch.

A program takes a tile of consecutive rows of one sequence with all query heads of one KV head, so keys are read once
per tile and group. It skips keys behind its last row and in front of the window, and masks only the tiles at these
edges. The grid is sized for any division of the rows into sequences, and a program finds its sequence by a search in
`query_start`: nothing comes back to the host (after vLLM's unified kernel, arXiv 2511.11581). Sequences with one row
are left to the decode kernel.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from llmscale.layers.ops import AttentionConstants, KvLayer, StepRows
from llmscale.layers.triton.decode_attention import LOG2_E
from llmscale.layers.triton.key_range import attend_to_range
from llmscale.layers.triton.launch import FUSED, padded, products_in_float32
from llmscale.layers.triton.tiling import ChunkTiling


@triton.jit
def sequence_of_tile(query_start, index, sequences, tile_rows: tl.constexpr):
    """The sequence that tile `index` belongs to, and the index of its first tile.

    Sequence s begins at tile `query_start[s] // tile_rows + s`: at most one tile per sequence is empty, and none is
    shared.
    """
    low, high = 0, sequences - 1
    while low < high:
        middle = (low + high + 1) // 2
        begins = tl.load(query_start + middle) // tile_rows + middle
        if begins <= index:
            low = middle
        else:
            high = middle - 1
    return low, tl.load(query_start + low) // tile_rows + low


@triton.jit
def visible_ranges(first, last, window: tl.constexpr, tile: tl.constexpr):
    """Keys that rows at positions `first` to `last` attend to, as four bounds: from the first key that any row sees,
    from the first that all see, to the end of those, to the end. Inner bounds are multiples of the tile."""
    end = last + 1
    common_end = (first + 1) // tile * tile
    begin = 0
    common_begin = 0
    if window is not None:
        begin = tl.maximum(first - window + 1, 0) // tile * tile
        common_begin = tl.cdiv(tl.maximum(last - window + 1, 0), tile) * tile
    common_begin = tl.minimum(tl.maximum(common_begin, begin), end)
    common_end = tl.maximum(common_end, common_begin)
    return begin, common_begin, common_end, end


@triton.jit(do_not_specialize=["sequences", "layer"])
def chunk_kernel(
    query,
    region,
    query_start,
    sequence_lengths,
    table_offsets,
    block_tables,
    out,
    scale,
    sequences,
    layer,
    layers: tl.constexpr,
    kv_heads: tl.constexpr,
    group: tl.constexpr,
    block_tokens: tl.constexpr,
    head_dim: tl.constexpr,
    padded_dim: tl.constexpr,
    window: tl.constexpr,
    widen: tl.constexpr,
    tile_lines: tl.constexpr,
    tile_rows: tl.constexpr,
    tile: tl.constexpr,
):
    """Grid (T // tile_rows + S, K). A tile has `tile_lines` lines: row times group plus head in the group."""
    kv_head = tl.program_id(1)
    sequence, first_tile = sequence_of_tile(query_start, tl.program_id(0), sequences, tile_rows)
    start = tl.load(query_start + sequence)
    rows = tl.load(query_start + sequence + 1) - start
    first = (tl.program_id(0) - first_tile) * tile_rows
    if (rows <= 1) | (first >= rows):
        return
    length = tl.load(sequence_lengths + sequence)
    line, element = tl.arange(0, tile_lines), tl.arange(0, padded_dim)
    row = first + line // group
    there = ((line < tile_rows * group) & (row < rows))[:, None] & (element < head_dim)[None, :]
    head = kv_head * group + line % group
    at = ((start + row).to(tl.int64) * (kv_heads * group) + head)[:, None] * head_dim + element[None, :]
    lines = tl.load(query + at, mask=there, other=0.0)
    if widen:
        lines = lines.to(tl.float32)
    position = length - rows + row
    last = length - rows + tl.minimum(first + tile_rows, rows) - 1
    begin, common_begin, common_end, end = visible_ranges(length - rows + first, last, window, tile)
    keys = region + (layer.to(tl.int64) * (2 * kv_heads) + kv_head) * (block_tokens * head_dim)
    table = block_tables + tl.load(table_offsets + sequence)
    values: tl.constexpr = kv_heads * block_tokens * head_dim
    maximum = tl.full([tile_lines], float("-inf"), tl.float32)
    total = tl.zeros([tile_lines], tl.float32)
    weighted = tl.zeros([tile_lines, padded_dim], tl.float32)
    if window is not None:
        maximum, total, weighted = attend_to_range(
            lines, position, maximum, total, weighted, keys, table, begin, common_begin, length, scale, window, widen,
            values, layers * 2 * values, block_tokens, head_dim, tile, masked=True,
        )  # fmt: skip
    maximum, total, weighted = attend_to_range(
        lines, position, maximum, total, weighted, keys, table, common_begin, common_end, length, scale, window, widen,
        values, layers * 2 * values, block_tokens, head_dim, tile, masked=False,
    )  # fmt: skip
    maximum, total, weighted = attend_to_range(
        lines, position, maximum, total, weighted, keys, table, common_end, end, length, scale, window, widen,
        values, layers * 2 * values, block_tokens, head_dim, tile, masked=True,
    )  # fmt: skip
    tl.store(out + at, (weighted / total[:, None]).to(out.dtype.element_ty), mask=there)


def launch_chunks(
    query: Tensor, attention: AttentionConstants, rows: StepRows, kv: KvLayer, out: Tensor, tiling: ChunkTiling
) -> None:
    """Attends for every sequence of the step with several rows; the rows of others are not touched."""
    spec, region = attention.spec, kv.region
    sequences = rows.sequence_lengths.shape[0]
    group = spec.query_heads // spec.kv_heads
    tile_rows = tiling.lines // group
    assert tile_rows > 0, f"a tile of {tiling.lines} lines holds no row of {group} query heads per KV head"
    chunk_kernel[(rows.positions.shape[0] // tile_rows + sequences, spec.kv_heads)](
        query,
        region,
        rows.query_start,
        rows.sequence_lengths,
        rows.table_offsets,
        rows.block_tables,
        out,
        spec.scale * LOG2_E,
        sequences,
        kv.layer,
        region.shape[1],
        spec.kv_heads,
        group,
        region.shape[4],
        spec.head_dim,
        padded(spec.head_dim),
        spec.window_tokens,
        products_in_float32(query.dtype),
        tiling.lines,
        tile_rows,
        tiling.tile,
        num_warps=tiling.warps,
        num_stages=tiling.stages,
        **FUSED,
    )
