"""Turns min-p, top-k and top-p into one threshold on the scaled scores, without sorting.

A kept token has a scaled score above the threshold, or equal to it and an id not after the last tied one. From block
maxima a bound follows below which no cut can lie; the few scores at or above it are gathered, in order of id, and the
cut is found among them bit by bit: the greatest float32 at and above which there are k scores, or the mass asked for.
Masses are the CPU's float32 exponentials, their sums float64 in a fixed order. O(vocabulary) to gather, 32 passes over
what was gathered. It does not know random numbers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from llmscale.layers.triton.sampler.exact_math import LAST_TOKEN, LOWEST, exact_exp, exact_ln, ordered, unordered

MIN_TEMPERATURE = tl.constexpr(1e-5)
"""Temperatures below this are greedy, as on the CPU."""

SAMPLED = tl.constexpr(0)
NOT_FINITE = tl.constexpr(1)
NO_CANDIDATE = tl.constexpr(2)


@triton.jit
def nth_greatest(values, count):
    """The `count`-th greatest of a block of float32 in registers; there must be as many."""
    keys = ordered(values)
    nth = tl.zeros([1], tl.uint32)
    bit = tl.full([1], 0x80000000, tl.uint32)
    for _ in range(32):
        tried = nth | bit
        reached = tl.sum((keys >= tried).to(tl.int32), 0)
        nth = tl.where(reached >= count, tried, nth)
        bit = bit >> 1
    return tl.max(unordered(nth), 0)


@triton.jit
def bound_kernel(
    score_maxima,
    part_broken,
    temperature,
    top_k,
    top_p,
    min_p,
    status,
    greatest_score,
    inverse_temperature,
    least_score,
    gather_bound,
    vocabulary: tl.constexpr,
    blocks: tl.constexpr,
    padded_blocks: tl.constexpr,
    parts: tl.constexpr,
    padded_parts: tl.constexpr,
):
    """Grid (R). Writes per row what became of it, the greatest score, the scale, the least scaled score that min-p
    leaves, and the bound at and above which scores are to be gathered: infinity where nothing else filters."""
    row = tl.program_id(0)
    block = tl.arange(0, padded_blocks)
    maxima = tl.load(score_maxima + row * blocks + block, mask=block < blocks, other=float("-inf"))
    part = tl.arange(0, padded_parts)
    broken = tl.max(tl.load(part_broken + row * parts + part, mask=part < parts, other=0), 0)
    greatest = tl.max(maxima, 0)
    nothing = tl.where(greatest == float("-inf"), NO_CANDIDATE, SAMPLED)
    state = tl.where(broken == 1, NOT_FINITE, nothing)
    tl.store(status + row, state)
    tl.store(greatest_score + row, greatest)
    heat = tl.load(temperature + row)
    if (heat < MIN_TEMPERATURE) | (state != SAMPLED):
        tl.store(inverse_temperature + row, 0.0)
        tl.store(least_score + row, LOWEST)
        tl.store(gather_bound + row, float("inf"))
        return
    inverse = tl.div_rn(tl.full([], 1.0, tl.float32), heat)
    scaled = (maxima - greatest) * inverse
    share, fraction = tl.load(top_p + row), tl.load(min_p + row)
    floor = exact_ln(tl.maximum(fraction, 1.17549435e-38))
    least = tl.where(fraction > 0.0, tl.maximum(floor, LOWEST), LOWEST)
    count = tl.load(top_k + row)
    bound = tl.full([], float("inf"), tl.float32)
    if (count > 0) & (count < vocabulary):
        bound = least
        if count <= blocks:
            bound = tl.maximum(nth_greatest(scaled, count), least)
    elif share < 1.0:
        # If every token had a score below this, together they would hold less than the share that is cut off.
        counted = tl.where((block < blocks) & (scaled >= least), exact_exp(scaled), 0.0)
        cut_each = (1.0 - share) * tl.sum(counted, 0) / vocabulary
        bound = tl.maximum(exact_ln(cut_each) - 2e-3, least)
    tl.store(inverse_temperature + row, inverse)
    tl.store(least_score + row, least)
    tl.store(gather_bound + row, bound)


@triton.jit
def scaled_tile(
    scores,
    greatest_score,
    inverse_temperature,
    row,
    vocabulary: tl.constexpr,
    tile_blocks: tl.constexpr,
):
    """Ids and scaled scores [ids] of this program's part; minus infinity behind the vocabulary."""
    ids = tl.program_id(1) * (tile_blocks * 64) + tl.arange(0, tile_blocks * 64)
    score = tl.load(scores + row.to(tl.int64) * vocabulary + ids, mask=ids < vocabulary, other=float("-inf"))
    return ids, (score - tl.load(greatest_score + row)) * tl.load(inverse_temperature + row)


@triton.jit
def count_kernel(
    scores,
    greatest_score,
    inverse_temperature,
    least_score,
    gather_bound,
    part_count,
    part_mass,
    vocabulary: tl.constexpr,
    tile_blocks: tl.constexpr,
    parts: tl.constexpr,
):
    """Grid (R, parts). How many scores reach the bound, and the mass (float64) of those that reach the least."""
    row, part = tl.program_id(0), tl.program_id(1)
    place = row * parts + part
    bound = tl.load(gather_bound + row)
    if bound == float("inf"):
        tl.store(part_count + place, 0)
        return
    _, scaled = scaled_tile(scores, greatest_score, inverse_temperature, row, vocabulary, tile_blocks)
    tl.store(part_count + place, tl.sum((scaled >= bound).to(tl.int32), 0))
    mass = tl.where(scaled >= tl.load(least_score + row), exact_exp(scaled), 0.0)
    tl.store(part_mass + place, tl.sum(mass.to(tl.float64), 0))


@triton.jit
def gather_kernel(
    scores,
    greatest_score,
    inverse_temperature,
    gather_bound,
    part_count,
    candidate_score,
    candidate_token,
    vocabulary: tl.constexpr,
    tile_blocks: tl.constexpr,
    parts: tl.constexpr,
    padded_parts: tl.constexpr,
):
    """Grid (R, parts). Writes the scores that reach the bound, and their ids, without gaps and in order of id: the
    order does not depend on which program is first, so that sums do not either."""
    row, part = tl.program_id(0), tl.program_id(1)
    if tl.load(part_count + row * parts + part) == 0:
        return
    other = tl.arange(0, padded_parts)
    before = tl.sum(tl.load(part_count + row * parts + other, mask=other < part, other=0), 0)
    ids, scaled = scaled_tile(scores, greatest_score, inverse_temperature, row, vocabulary, tile_blocks)
    near = scaled >= tl.load(gather_bound + row)
    rank = tl.cumsum(near.to(tl.int32), 0) - 1
    place = row.to(tl.int64) * vocabulary + before + rank
    tl.store(candidate_score + place, scaled, mask=near)
    tl.store(candidate_token + place, ids, mask=near)


@triton.jit
def reached(score, token, count, least, last, piece: tl.constexpr, by_mass: tl.constexpr):
    """Mass (float64) or number of the candidates with a score of at least `least` and an id of at most `last`."""
    total = tl.zeros([1], tl.float64)
    for start in range(0, count, piece):
        at = start + tl.arange(0, piece)
        value = tl.load(score + at, mask=at < count, other=float("-inf"))
        counts = (value >= least) & (at < count)
        if last is not None:
            counts = counts & (value == least) & (tl.load(token + at, mask=at < count, other=0) <= last)
        if by_mass:
            total += tl.sum(tl.where(counts, exact_exp(value), 0.0).to(tl.float64), 0)
        else:
            total += tl.sum(counts.to(tl.float64), 0)
    return total


@triton.jit
def greatest_reaching(score, token, count, target, piece: tl.constexpr, by_mass: tl.constexpr):
    """The greatest float32 at and above which the candidates' mass or number reaches `target`."""
    key = tl.zeros([1], tl.uint32)
    bit = tl.full([1], 0x80000000, tl.uint32)
    for _ in range(32):
        tried = key | bit
        total = reached(score, token, count, unordered(tried), None, piece, by_mass)
        key = tl.where(total >= target, tried, key)
        bit = bit >> 1
    return unordered(key)


@triton.jit
def last_of_ties(score, token, count, value, missing, each, piece: tl.constexpr):
    """The id of the candidate with score `value` with which their masses of `each`, by id, reach `missing`."""
    last = tl.zeros([1], tl.int32)
    bit = tl.full([1], 0x40000000, tl.int32)
    for _ in range(31):
        tried = last | bit
        before = reached(score, token, count, value, tried - 1, piece, by_mass=False)
        last = tl.where(before * each < missing, tried, last)
        bit = bit >> 1
    return last


@triton.jit
def cut_kernel(
    least_score,
    gather_bound,
    top_k,
    top_p,
    part_count,
    part_mass,
    candidate_score,
    candidate_token,
    threshold,
    last_tied,
    vocabulary: tl.constexpr,
    parts: tl.constexpr,
    padded_parts: tl.constexpr,
    piece: tl.constexpr,
):
    """Grid (R). Writes the least scaled score that is kept, and the last id among those equal to it."""
    row = tl.program_id(0)
    value = tl.load(least_score + row) + tl.zeros([1], tl.float32)
    last = tl.zeros([1], tl.int32) + LAST_TOKEN
    if tl.load(gather_bound + row) < float("inf"):
        part = tl.arange(0, padded_parts)
        count = tl.sum(tl.load(part_count + row * parts + part, mask=part < parts, other=0), 0)
        score = candidate_score + row.to(tl.int64) * vocabulary
        token = candidate_token + row.to(tl.int64) * vocabulary
        most = tl.load(top_k + row)
        share = tl.load(top_p + row).to(tl.float64)
        total = tl.sum(tl.load(part_mass + row * parts + part, mask=part < parts, other=0.0), 0)
        if (most > 0) & (most < vocabulary):
            if count >= most:
                value = greatest_reaching(score, token, count, most, piece, by_mass=False)
            if share < 1.0:
                total = tl.sum(reached(score, token, count, value, None, piece, by_mass=True), 0)
        if share < 1.0:
            # Above zero, so that a share of 0 still needs the greatest score.
            target = tl.maximum(share * total, 2.2250738585072014e-308)
            cut = greatest_reaching(score, token, count, target, piece, by_mass=True)
            # Only rounding can leave the target unreached; then nothing is cut off.
            if tl.max((cut >= value).to(tl.int32), 0) == 1:
                value = cut
                above = reached(score, token, count, unordered(ordered(value) + 1), None, piece, by_mass=True)
                ties = reached(score, token, count, value, LAST_TOKEN, piece, by_mass=False)
                each = exact_exp(value).to(tl.float64)
                if tl.max(((ties - 1) * each >= target - above).to(tl.int32), 0) == 1:
                    last = last_of_ties(score, token, count, value, target - above, each, piece)
    one = tl.zeros([1], tl.int32)
    tl.store(threshold + row + one, value)
    tl.store(last_tied + row + one, last)
