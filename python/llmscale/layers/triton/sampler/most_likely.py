"""The most likely tokens of the model's own distribution, greatest first, the lower id first among equals.

One program per row that asks for them keeps the block maxima in registers and takes one token per round: the greatest
block, its greatest token behind the last one taken, the block's next maximum. O(blocks + 64) per token. It does not
know what was sampled.
"""

from __future__ import annotations

import triton
import triton.language as tl

from llmscale.layers.triton.sampler.exact_math import LAST_TOKEN
from llmscale.layers.triton.sampler.scores import BLOCK_TOKENS
from llmscale.layers.triton.sampler.threshold import SAMPLED


@triton.jit
def most_likely_kernel(
    logits,
    model_maxima,
    status,
    log_sum,
    top_logprobs,
    top_tokens,
    top_values,
    top_counts,
    vocabulary: tl.constexpr,
    blocks: tl.constexpr,
    padded_blocks: tl.constexpr,
    max_top: tl.constexpr,
):
    """Grid (R). Writes up to `max_top` ids and log probabilities per row and how many; tokens with a logit of minus
    infinity are not counted."""
    row = tl.program_id(0)
    count = tl.minimum(tl.load(top_logprobs + row), max_top)
    if tl.load(status + row) != SAMPLED:
        count = 0
    own = logits + row.to(tl.int64) * vocabulary
    block = tl.arange(0, padded_blocks)
    maxima = tl.load(model_maxima + row * blocks + block, mask=block < blocks, other=float("-inf"))
    logarithm = tl.load(log_sum + row)
    last_value = tl.full([], float("inf"), tl.float32)
    last_token = tl.full([], 0, tl.int32)
    written = tl.full([], 0, tl.int32)
    for rank in range(count):
        greatest = tl.max(maxima, 0)
        if greatest > float("-inf"):
            best = tl.min(tl.where(maxima == greatest, block, LAST_TOKEN), 0)
            ids = best * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
            value = tl.load(own + ids, mask=ids < vocabulary, other=float("-inf")).to(tl.float32)
            behind = (value < last_value) | ((value == last_value) & (ids > last_token))
            last_token = tl.min(tl.where(behind & (value == greatest), ids, LAST_TOKEN), 0)
            last_value = greatest
            left = tl.where(behind & ((value < greatest) | (ids > last_token)), value, float("-inf"))
            maxima = tl.where(block == best, tl.max(left, 0), maxima)
            tl.store(top_tokens + row * max_top + rank, last_token)
            tl.store(top_values + row * max_top + rank, (greatest.to(tl.float64) - logarithm).to(tl.float32))
            written += 1
    tl.store(top_counts + row, written)
