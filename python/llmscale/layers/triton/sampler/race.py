"""The exponential race: the kept token with the greatest scaled score plus Gumbel noise, the lower id among equals.

Each program runs the race of 4,096 ids and leaves its winner; one program per row compares the winners. Noise is made
only where a score reaches the threshold. A greedy row is a race without noise. O(vocabulary) per row. It does not know
how the threshold came about.
"""

from __future__ import annotations

import triton
import triton.language as tl

from llmscale.layers.triton.sampler.exact_math import LAST_TOKEN, gumbel, random_words
from llmscale.layers.triton.sampler.threshold import MIN_TEMPERATURE, SAMPLED

LANES = tl.constexpr(16)
WORDS = tl.constexpr(4)


@triton.jit
def kept_key(scores, ids, words, greatest, inverse, threshold, last, vocabulary: tl.constexpr):
    """Scaled score plus noise of the ids [blocks, 16] that are kept, minus infinity for others."""
    score = tl.load(scores + ids, mask=ids < vocabulary, other=float("-inf"))
    scaled = (score - greatest) * inverse
    kept = (scaled > threshold) | ((scaled >= threshold) & (ids <= last))
    return tl.where(kept, scaled + gumbel(words), float("-inf"))


@triton.jit
def better(best_key, best_token, key, ids):
    """The winner among a block of ids and the best so far."""
    highest = tl.max(tl.max(key, 1), 0)
    candidate = tl.where(key == highest, ids, LAST_TOKEN)
    lowest = tl.min(tl.min(candidate, 1), 0)
    ahead = (highest > best_key) | ((highest == best_key) & (lowest < best_token))
    return tl.where(ahead, highest, best_key), tl.where(ahead, lowest, best_token)


@triton.jit
def race_kernel(
    scores,
    greatest_score,
    inverse_temperature,
    temperature,
    threshold,
    last_tied,
    seed_low,
    seed_high,
    choice,
    position,
    part_key,
    part_token,
    vocabulary: tl.constexpr,
    tile_blocks: tl.constexpr,
    parts: tl.constexpr,
):
    """Grid (R, parts). Writes the greatest key and its id; a key of minus infinity where nothing is kept."""
    row, part = tl.program_id(0), tl.program_id(1)
    block = part * tile_blocks + tl.arange(0, tile_blocks)
    lane = tl.arange(0, LANES)
    first = block[:, None] * (LANES * WORDS) + lane[None, :]
    own = scores + row.to(tl.int64) * vocabulary
    greatest = tl.load(greatest_score + row)
    inverse = tl.load(inverse_temperature + row)
    best_key = tl.full([], float("-inf"), tl.float32)
    best_token = tl.full([], LAST_TOKEN, tl.int32)
    if tl.load(temperature + row) < MIN_TEMPERATURE:
        for word in tl.static_range(WORDS):
            greedy_ids = first + word * LANES
            greedy_key = tl.load(own + greedy_ids, mask=greedy_ids < vocabulary, other=float("-inf"))
            best_key, best_token = better(best_key, best_token, greedy_key, greedy_ids)
    else:
        least, last = tl.load(threshold + row), tl.load(last_tied + row)
        ids = part * (tile_blocks * LANES * WORDS) + tl.arange(0, tile_blocks * LANES * WORDS)
        score = tl.load(own + ids, mask=ids < vocabulary, other=float("-inf"))
        if tl.max((score - greatest) * inverse, 0) >= least:
            counters = block[:, None] * LANES + lane[None, :]
            words0, words1, words2, words3 = random_words(
                tl.load(seed_low + row),
                tl.load(seed_high + row),
                tl.load(choice + row),
                tl.load(position + row),
                counters,
            )
            key = kept_key(own, first, words0, greatest, inverse, least, last, vocabulary)
            best_key, best_token = better(best_key, best_token, key, first)
            key = kept_key(own, first + LANES, words1, greatest, inverse, least, last, vocabulary)
            best_key, best_token = better(best_key, best_token, key, first + LANES)
            key = kept_key(own, first + 2 * LANES, words2, greatest, inverse, least, last, vocabulary)
            best_key, best_token = better(best_key, best_token, key, first + 2 * LANES)
            key = kept_key(own, first + 3 * LANES, words3, greatest, inverse, least, last, vocabulary)
            best_key, best_token = better(best_key, best_token, key, first + 3 * LANES)
    tl.store(part_key + row * parts + part, best_key)
    tl.store(part_token + row * parts + part, best_token)


@triton.jit
def finish_kernel(
    part_key,
    part_token,
    status,
    logits,
    part_maximum,
    part_sum,
    tokens,
    logprobs,
    log_sum,
    vocabulary: tl.constexpr,
    parts: tl.constexpr,
    padded_parts: tl.constexpr,
):
    """Grid (R). Writes the token, 0 for a row without one, its log probability under the model's own distribution, and
    the logarithm (float64) of the sum of the exponentials of the row's logits."""
    row = tl.program_id(0)
    part = tl.arange(0, padded_parts)
    there = part < parts
    if tl.load(status + row) != SAMPLED:
        tl.store(tokens + row, 0)
        tl.store(logprobs + row, float("nan"))
        return
    key = tl.load(part_key + row * parts + part, mask=there, other=float("-inf"))
    token = tl.load(part_token + row * parts + part, mask=there, other=LAST_TOKEN)
    winner = tl.min(tl.where(key == tl.max(key, 0), token, LAST_TOKEN), 0)
    tl.store(tokens + row, winner)
    maximum = tl.load(part_maximum + row * parts + part, mask=there, other=float("-inf"))
    greatest = tl.max(maximum, 0)
    sums = tl.load(part_sum + row * parts + part, mask=there, other=0.0).to(tl.float64)
    total = tl.sum(sums * tl.exp(maximum - greatest).to(tl.float64), 0)
    logarithm = greatest.to(tl.float64) + tl.log(total)
    tl.store(log_sum + row, logarithm)
    chosen = tl.load(logits + row.to(tl.int64) * vocabulary + winner).to(tl.float64)
    tl.store(logprobs + row, (chosen - logarithm).to(tl.float32))
