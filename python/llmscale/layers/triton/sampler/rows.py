"""How the rows of a batch are to be sampled: columns on the device, and what they are made from.

One entry per row in every column; single logits that change are one list for all rows, sorted by row, with each token
once per row. A captured graph reads the columns where they lie, so filling them anew is all that a step needs. Linear
in the rows and in the changes. It does not know requests; ranges were checked where the request came in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

SEEN = 1
"""Flag of a change: the token is in the prompt or the output."""
SUPPRESSED = 2
"""Flag of a change: the token must not be sampled."""


@dataclass(frozen=True, slots=True)
class RowSampling:
    """One row; meanings and ranges are those of `SamplerRow` of the CPU sampler."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0
    choice: int = 0
    position: int = 0
    top_logprobs: int = 0
    prompt_tokens: frozenset[int] = frozenset()
    generated_counts: Mapping[int, int] = field(default_factory=dict)
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    suppressed: frozenset[int] = frozenset()
    allowed: frozenset[int] | None = None
    """the only tokens that may be sampled"""

    def changed_tokens(self) -> list[int]:
        """Every token whose logit may change, ascending."""
        penalized = self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0
        seen = self.prompt_tokens | self.generated_counts.keys() if penalized else set[int]()
        return sorted(seen | self.logit_bias.keys() | self.suppressed)

    def flags(self, token: int) -> int:
        """`SEEN` and `SUPPRESSED` of one token."""
        seen = token in self.prompt_tokens or self.generated_counts.get(token, 0) > 0
        return (SEEN if seen else 0) | (SUPPRESSED if token in self.suppressed else 0)


@dataclass(frozen=True, slots=True)
class SamplingRows:
    """R rows and N changes on the device."""

    temperature: Tensor
    """float32 [R], as are the next five"""
    top_p: Tensor
    min_p: Tensor
    repetition_penalty: Tensor
    presence_penalty: Tensor
    frequency_penalty: Tensor
    top_k: Tensor
    """int32 [R], as are the next three; 0 keeps all"""
    choice: Tensor
    position: Tensor
    top_logprobs: Tensor
    seed_low: Tensor
    """int32 [R], the low bits of the unsigned seed"""
    seed_high: Tensor
    change_start: Tensor
    """int32 [R + 1], first change of each row"""
    change_token: Tensor
    """int32 [N], as are the next two"""
    change_count: Tensor
    """how often the token was generated"""
    change_flags: Tensor
    change_bias: Tensor
    """float32 [N]"""
    allowed: Tensor
    """int32 [masked rows, vocabulary / 32 rounded up], bits by id"""
    allowed_row: Tensor
    """int32 [R], the row of `allowed` that holds, or `allowed.shape[0]` for a row without a mask"""


def pack_rows(rows: Sequence[RowSampling], vocabulary: int, device: torch.device) -> SamplingRows:
    """Columns for `rows`, newly allocated."""

    def column(name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.tensor([getattr(row, name) for row in rows], dtype=dtype, device=device)

    def int32(values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    changes = [row.changed_tokens() for row in rows]
    starts = [0]
    for tokens in changes:
        starts.append(starts[-1] + len(tokens))
    pairs = [(row, token) for row, tokens in zip(rows, changes, strict=True) for token in tokens]
    masks = [row.allowed for row in rows if row.allowed is not None]
    masked_rows = iter(range(len(masks)))
    return SamplingRows(
        temperature=column("temperature"),
        top_p=column("top_p"),
        min_p=column("min_p"),
        repetition_penalty=column("repetition_penalty"),
        presence_penalty=column("presence_penalty"),
        frequency_penalty=column("frequency_penalty"),
        top_k=column("top_k", torch.int32),
        choice=int32([_signed(row.choice, 32) for row in rows]),
        position=column("position", torch.int32),
        top_logprobs=column("top_logprobs", torch.int32),
        seed_low=int32([_signed(row.seed % 2**32, 32) for row in rows]),
        seed_high=int32([_signed(row.seed >> 32, 32) for row in rows]),
        change_start=int32(starts),
        change_token=int32([token for _, token in pairs]),
        change_count=int32([row.generated_counts.get(token, 0) for row, token in pairs]),
        change_flags=int32([row.flags(token) for row, token in pairs]),
        change_bias=torch.tensor([row.logit_bias.get(token, 0.0) for row, token in pairs], device=device),
        allowed=_bits(masks, vocabulary).to(device),
        allowed_row=int32([len(masks) if row.allowed is None else next(masked_rows) for row in rows]),
    )


def _signed(value: int, bits: int) -> int:
    """The signed number of the same bits."""
    return value - (1 << bits) if value >> (bits - 1) else value


def _bits(masks: Sequence[frozenset[int]], vocabulary: int) -> Tensor:
    """Bit `id % 32` of word `id // 32`."""
    words = torch.zeros(len(masks), -(-vocabulary // 32), dtype=torch.int64)
    for row, mask in enumerate(masks):
        for token in mask:
            words[row, token // 32] |= 1 << (token % 32)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
