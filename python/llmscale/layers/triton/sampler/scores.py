"""Scores to sample from: the logits in float32 with mask, penalties, bias and suppression, and what is known of a row.

Three passes: copy with the mask, which also takes the model's own block maxima and sums of exponentials; the changes of
single tokens; the block maxima of the result. O(vocabulary) per row, spread over programs of 4,096 ids. It does not
know temperatures or thresholds.
"""

from __future__ import annotations

import triton
import triton.language as tl

BLOCK_TOKENS = tl.constexpr(64)
"""Ids that share a maximum, as on the CPU."""


@triton.jit
def tile_ids(tile_blocks: tl.constexpr):
    """Ids [blocks, 64] of this program's part of the vocabulary, which the second axis of the grid counts."""
    block = tl.program_id(1) * tile_blocks + tl.arange(0, tile_blocks)
    return block, block[:, None] * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)[None, :]


@triton.jit
def has_broken(values):
    """1 if any is NaN or plus infinity, else 0."""
    fine = values < float("inf")  # false for NaN too
    return tl.max(tl.max(tl.where(fine, 0, 1), 1), 0)


@triton.jit(do_not_specialize=["masks"])
def copy_kernel(
    logits,
    allowed,
    allowed_row,
    scores,
    model_maxima,
    part_maximum,
    part_sum,
    part_broken,
    masks,
    vocabulary: tl.constexpr,
    blocks: tl.constexpr,
    tile_blocks: tl.constexpr,
    parts: tl.constexpr,
):
    """Grid (R, parts). Writes `scores` [R, V], `model_maxima` [R, blocks], and per part the maximum, the sum of
    exponentials relative to it, and whether a logit is NaN or plus infinity, [R, parts] each."""
    row, part = tl.program_id(0), tl.program_id(1)
    block, ids = tile_ids(tile_blocks)
    inside = ids < vocabulary
    first = row.to(tl.int64) * vocabulary
    logit = tl.load(logits + first + ids, mask=inside, other=float("-inf")).to(tl.float32)
    tl.store(part_broken + row * parts + part, has_broken(logit))
    maxima = tl.max(logit, 1)
    tl.store(model_maxima + row * blocks + block, maxima, mask=block < blocks)
    greatest = tl.max(maxima, 0)
    base = tl.where(greatest == float("-inf"), 0.0, greatest)
    tl.store(part_maximum + row * parts + part, greatest)
    tl.store(part_sum + row * parts + part, tl.sum(tl.sum(tl.exp(logit - base), 1), 0))
    mask = tl.load(allowed_row + row)
    if mask < masks:
        words: tl.constexpr = (vocabulary + 31) // 32
        word = tl.load(allowed + mask.to(tl.int64) * words + ids // 32, mask=inside, other=0)
        logit = tl.where(((word >> (ids % 32)) & 1) == 1, logit, float("-inf"))
    tl.store(scores + first + ids, logit, mask=inside)


@triton.jit
def change_kernel(
    scores,
    change_start,
    change_token,
    change_count,
    change_flags,
    change_bias,
    repetition_penalty,
    presence_penalty,
    frequency_penalty,
    vocabulary: tl.constexpr,
    piece: tl.constexpr,
):
    """Grid (R). Each change once, in the CPU's order: repetition, frequency, presence, bias, suppression."""
    row = tl.program_id(0)
    repetition = tl.load(repetition_penalty + row)
    presence = tl.load(presence_penalty + row)
    frequency = tl.load(frequency_penalty + row)
    end = tl.load(change_start + row + 1)
    for start in range(tl.load(change_start + row), end, piece):
        at = start + tl.arange(0, piece)
        there = at < end
        place = scores + row.to(tl.int64) * vocabulary + tl.load(change_token + at, mask=there, other=0)
        flags = tl.load(change_flags + at, mask=there, other=0)
        count = tl.load(change_count + at, mask=there, other=0)
        score = tl.load(place, mask=there, other=0.0)
        penalized = tl.where(score > 0.0, tl.div_rn(score, repetition), score * repetition)
        score = tl.where((flags & 1) == 1, penalized, score)
        score = tl.where(count > 0, score - frequency * count.to(tl.float32), score)
        score = tl.where(count > 0, score - presence, score)
        score = score + tl.load(change_bias + at, mask=there, other=0.0)
        score = tl.where((flags & 2) == 2, float("-inf"), score)
        tl.store(place, score, mask=there)


@triton.jit
def maxima_kernel(
    scores,
    score_maxima,
    part_broken,
    vocabulary: tl.constexpr,
    blocks: tl.constexpr,
    tile_blocks: tl.constexpr,
    parts: tl.constexpr,
):
    """Grid (R, parts). Writes `score_maxima` [R, blocks], and adds to what is broken: a bias can overflow."""
    row, part = tl.program_id(0), tl.program_id(1)
    block, ids = tile_ids(tile_blocks)
    score = tl.load(scores + row.to(tl.int64) * vocabulary + ids, mask=ids < vocabulary, other=float("-inf"))
    tl.store(score_maxima + row * blocks + block, tl.max(score, 1), mask=block < blocks)
    place = part_broken + row * parts + part
    tl.store(place, tl.maximum(tl.load(place), has_broken(score)))
