"""The inner loop of attention: a tile of queries against a range of a sequence's keys and values, block by block.

It is the running softmax of FlashAttention (Dao 2023, arXiv 2307.08691) in powers of two: maximum, sum and weighted
values of what was seen so far, in float32. Linear in the keys of the range; a tile of keys may span several blocks or
be a part of one. Decode and chunk kernels differ only in which queries and which range they bring. It does not know
either, nor whether others see the rest of the keys.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def attend_to_range(
    query,
    positions,
    maximum,
    total,
    weighted,
    keys,
    table,
    begin,
    end,
    length,
    scale,
    window: tl.constexpr,
    widen: tl.constexpr,
    value_distance: tl.constexpr,
    block_distance: tl.constexpr,
    block_tokens: tl.constexpr,
    head_dim: tl.constexpr,
    tile: tl.constexpr,
    masked: tl.constexpr,
):
    """Adds the keys `begin` to `end` (a multiple of `tile` apart, or up to `length`) to what was seen.

    `query` [M, padded D] and `positions` [M] are the tile's rows; `maximum` and `total` [M] and `weighted` [M, padded
    D] are the state, in float32 and powers of two. `keys` points at the first block's keys of this head in this layer,
    its values lie `value_distance` elements behind, the next block `block_distance`. `scale` includes log2(e). Not
    `masked` means that every row sees every key of the range.
    """
    padded_dim: tl.constexpr = query.shape[1]
    element = tl.arange(0, padded_dim)
    for start in range(begin, end, tile):
        at = start + tl.arange(0, tile)
        present = at < length
        block = tl.load(table + at // block_tokens, mask=present, other=0).to(tl.int64)
        address = block * block_distance + (at % block_tokens) * head_dim
        there = present[:, None] & (element < head_dim)[None, :]
        # Slots past the length hold other sequences' old bytes, NaN perhaps: they must not be multiplied, not by 0.
        key = tl.load(keys + address[:, None] + element[None, :], mask=there, other=0.0)
        value = tl.load(keys + value_distance + address[:, None] + element[None, :], mask=there, other=0.0)
        if widen:
            key, value = key.to(tl.float32), value.to(tl.float32)
        scores = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
        if masked:
            visible = at[None, :] <= positions[:, None]
            if window is not None:
                visible = visible & (positions[:, None] - at[None, :] < window)
            scores = tl.where(visible, scores, float("-inf"))
        highest = tl.maximum(maximum, tl.max(scores, 1))
        # A row that has seen nothing yet has no maximum to subtract: infinity less infinity would be NaN.
        base = tl.where(highest == float("-inf"), 0.0, highest)
        faded = tl.exp2(maximum - base)
        weights = tl.exp2(scores - base[:, None])
        total = total * faded + tl.sum(weights, 1)
        weighted = weighted * faded[:, None] + tl.dot(weights.to(value.dtype), value, input_precision="ieee")
        maximum = highest
    return maximum, total, weighted
