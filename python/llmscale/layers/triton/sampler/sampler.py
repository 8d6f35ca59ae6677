"""Samples a token for every row of a batch of logits on the device, token for token what the CPU sampler picks.

Ten launches, whatever the rows ask for: what a row does not need, its programs skip on the device. Grids follow from
the number of rows and the vocabulary, and nothing is read back or allocated, so sampling can be part of a captured
graph. Equal logits and parameters give the CPU's tokens; only a top-p cut within one rounding of a float64 sum could
fall elsewhere. Log probabilities agree to about 2e-6. Memory: 16 bytes per row and vocabulary entry. It does not know
requests, stop tokens or text.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from llmscale.layers.triton.launch import EXACT, FUSED, blocks_of, padded, require_dense
from llmscale.layers.triton.sampler import threshold
from llmscale.layers.triton.sampler.handing_on import hand_on_kernel
from llmscale.layers.triton.sampler.most_likely import most_likely_kernel
from llmscale.layers.triton.sampler.race import finish_kernel, race_kernel
from llmscale.layers.triton.sampler.rows import SamplingRows
from llmscale.layers.triton.sampler.scores import BLOCK_TOKENS, change_kernel, copy_kernel, maxima_kernel

MAX_TOP_LOGPROBS = 20
DRAWN_COLUMNS = 4 + 2 * MAX_TOP_LOGPROBS
TILE_BLOCKS = 64
"""4,096 ids in a program: 32 in each of 128 threads."""
CHANGES = 256
CANDIDATES = 2048
"""Of 8 warps, 8 in a thread; 16 spilled registers."""


@dataclass(frozen=True, slots=True)
class SampledRows:
    """What became of R rows, on the device, valid until the next call."""

    status: Tensor
    """int32 [R]: 0 sampled, 1 a logit is NaN or plus infinity, 2 every token is suppressed, masked or minus infinity"""
    tokens: Tensor
    """int32 [R]; 0 where there is none"""
    logprobs: Tensor
    """float32 [R], of the sampled token under the softmax of the logits as given; NaN where there is none"""
    top_tokens: Tensor
    """int32 [R, 20], the most likely first"""
    top_logprobs: Tensor
    """float32 [R, 20]"""
    top_counts: Tensor
    """int32 [R], how many of these were asked for and are there"""


class _Room:
    """Memory of the passes, for the largest batch: a name, a dtype and a width per row."""

    def __init__(self, rows: int, vocabulary: int, device: torch.device) -> None:
        blocks = blocks_of(vocabulary, BLOCK_TOKENS.value)
        parts = blocks_of(blocks, TILE_BLOCKS)

        def room(width: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(rows, width, dtype=dtype, device=device)

        self.scores, self.candidate_scores = room(vocabulary), room(vocabulary)
        self.candidate_tokens = room(vocabulary, torch.int32)
        self.model_maxima, self.score_maxima = room(blocks), room(blocks)
        self.part_maximum, self.part_sum, self.part_key = room(parts), room(parts), room(parts)
        self.part_broken, self.part_count, self.part_token = (room(parts, torch.int32) for _ in range(3))
        self.part_mass = room(parts, torch.float64)
        self.greatest, self.inverse_temperature, self.least = room(1), room(1), room(1)
        self.bound, self.threshold = room(1), room(1)
        self.last_tied = room(1, torch.int32)
        self.log_sum = room(1, torch.float64)


def _columns(drawn: Tensor, max_rows: int) -> SampledRows:
    """Views of one memory, so that one transfer takes ids and log probabilities away, or with the rest of it all."""
    ends = [max_rows * column for column in (1, 2, 3, 4, 4 + MAX_TOP_LOGPROBS, DRAWN_COLUMNS)]
    status, tokens, logprobs, counts, top_tokens, top_logprobs = (
        drawn[start:end] for start, end in pairwise([0, *ends])
    )
    return SampledRows(
        status=status,
        tokens=tokens,
        logprobs=logprobs.view(torch.float32),
        top_tokens=top_tokens.view(max_rows, MAX_TOP_LOGPROBS),
        top_logprobs=top_logprobs.view(torch.float32).view(max_rows, MAX_TOP_LOGPROBS),
        top_counts=counts,
    )


class TritonSampler:
    """Samples batches of up to `max_rows` rows of logits over `vocabulary` ids; what it leaves lies in `drawn`."""

    def __init__(self, vocabulary: int, max_rows: int, device: torch.device) -> None:
        self._vocabulary = vocabulary
        self._blocks = blocks_of(vocabulary, BLOCK_TOKENS.value)
        self._parts = blocks_of(self._blocks, TILE_BLOCKS)
        self._room = _Room(max_rows, vocabulary, device)
        self._rows = max_rows

        # Fourfold, so that every column begins at 16 bytes.
        self.max_rows = blocks_of(max_rows, 4) * 4
        self.drawn = torch.empty(self.max_rows * DRAWN_COLUMNS, dtype=torch.int32, device=device)
        self._sampled = _columns(self.drawn, self.max_rows)

    def sample(self, logits: Tensor, rows: SamplingRows) -> SampledRows:
        """`logits` [R, vocabulary] in float32, float16 or bfloat16, one row for each of `rows`."""
        require_dense(logits=logits)
        count = logits.shape[0]
        given = rows.temperature.shape[0]
        assert logits.shape == (given, self._vocabulary), (logits.shape, given, self._vocabulary)
        sampled = self._sampled
        assert count <= self._rows, f"{count} rows, built for {self._rows}"
        self._score(logits, rows)
        self._cut(rows, count)
        self._race(logits, rows)
        return SampledRows(
            status=sampled.status[:count],
            tokens=sampled.tokens[:count],
            logprobs=sampled.logprobs[:count],
            top_tokens=sampled.top_tokens[:count],
            top_logprobs=sampled.top_logprobs[:count],
            top_counts=sampled.top_counts[:count],
        )

    def hand_on(self, drawn_from: Tensor, token_ids: Tensor) -> None:
        """See `DeviceSampler`. One launch, and no more work where every id is known."""
        require_dense(drawn_from=drawn_from, token_ids=token_ids)
        hand_on_kernel[(drawn_from.shape[0],)](drawn_from, self._sampled.tokens, token_ids, **EXACT)

    def _score(self, logits: Tensor, rows: SamplingRows) -> None:
        """Scores to sample from, and their block maxima."""
        room, vocabulary, blocks, parts = self._room, self._vocabulary, self._blocks, self._parts
        grid = (logits.shape[0], parts)
        copy_kernel[grid](
            logits, rows.allowed, rows.allowed_row, room.scores, room.model_maxima, room.part_maximum, room.part_sum,
            room.part_broken, rows.allowed.shape[0], vocabulary, blocks, TILE_BLOCKS, parts, **FUSED,
        )  # fmt: skip
        change_kernel[(logits.shape[0],)](
            room.scores, rows.change_start, rows.change_token, rows.change_count, rows.change_flags, rows.change_bias,
            rows.repetition_penalty, rows.presence_penalty, rows.frequency_penalty, vocabulary, CHANGES, **EXACT,
        )  # fmt: skip
        maxima_kernel[grid](
            room.scores, room.score_maxima, room.part_broken, vocabulary, blocks, TILE_BLOCKS, parts, **FUSED,
        )  # fmt: skip

    def _cut(self, rows: SamplingRows, count: int) -> None:
        """The threshold of every row."""
        room, vocabulary, parts = self._room, self._vocabulary, self._parts
        threshold.bound_kernel[(count,)](
            room.score_maxima, room.part_broken, rows.temperature, rows.top_k, rows.top_p, rows.min_p,
            self._sampled.status, room.greatest, room.inverse_temperature, room.least, room.bound, vocabulary,
            self._blocks, padded(self._blocks), parts, padded(parts), **EXACT,
        )  # fmt: skip
        threshold.count_kernel[(count, parts)](
            room.scores, room.greatest, room.inverse_temperature, room.least, room.bound, room.part_count,
            room.part_mass, vocabulary, TILE_BLOCKS, parts, **EXACT,
        )  # fmt: skip
        threshold.gather_kernel[(count, parts)](
            room.scores, room.greatest, room.inverse_temperature, room.bound, room.part_count, room.candidate_scores,
            room.candidate_tokens, vocabulary, TILE_BLOCKS, parts, padded(parts), **EXACT,
        )  # fmt: skip
        threshold.cut_kernel[(count,)](
            room.least, room.bound, rows.top_k, rows.top_p, room.part_count, room.part_mass, room.candidate_scores,
            room.candidate_tokens, room.threshold, room.last_tied, vocabulary, parts, padded(parts), CANDIDATES,
            num_warps=8, **EXACT,
        )  # fmt: skip

    def _race(self, logits: Tensor, rows: SamplingRows) -> None:
        """Tokens and log probabilities."""
        room, sampled, vocabulary, parts = self._room, self._sampled, self._vocabulary, self._parts
        count = logits.shape[0]
        race_kernel[(count, parts)](
            room.scores, room.greatest, room.inverse_temperature, rows.temperature, room.threshold, room.last_tied,
            rows.seed_low, rows.seed_high, rows.choice, rows.position, room.part_key, room.part_token, vocabulary,
            TILE_BLOCKS, parts, **EXACT,
        )  # fmt: skip
        finish_kernel[(count,)](
            room.part_key, room.part_token, sampled.status, logits, room.part_maximum, room.part_sum, sampled.tokens,
            sampled.logprobs, room.log_sum, vocabulary, parts, padded(parts), **FUSED,
        )  # fmt: skip
        most_likely_kernel[(count,)](
            logits, room.model_maxima, sampled.status, room.log_sum, rows.top_logprobs, sampled.top_tokens,
            sampled.top_logprobs, sampled.top_counts, vocabulary, self._blocks, padded(self._blocks),
            MAX_TOP_LOGPROBS, **FUSED,
        )  # fmt: skip
