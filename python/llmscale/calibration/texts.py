"""Calibration texts as token ids: from a file, or from the embedded model's own questions of the training split.

What is drawn depends on file, limits and seed alone. Bounded by sequences, tokens of each and tokens of all. It does
not know models.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from llmscale.embedded.tasks.splits import seen_items
from llmscale.errors import ConfigError
from llmscale.samples import Sample, TextEncoder, drawn, encoded, item_sample, read_samples

BUILT_IN = "builtin"
"""In place of a file: questions and answers that tiny-chat was trained on the like of."""


@dataclass(frozen=True, slots=True)
class TextLimits:
    """How much is used; texts are cut to `max_sequence_tokens`, and reading stops at `max_tokens`."""

    max_sequences: int = 1_024
    max_sequence_tokens: int = 2_048
    max_tokens: int = 65_536


def calibration_texts(source: str, tokenizer: TextEncoder, limits: TextLimits, seed: int) -> list[tuple[int, ...]]:
    """Token ids of the texts of `source`, a path or BUILT_IN. Raises ConfigError."""
    for name, option in (
        ("max_sequences", " (--calibration-samples)"),
        ("max_sequence_tokens", ""),
        ("max_tokens", " (--calibration-tokens)"),
    ):
        if getattr(limits, name) < 1:
            raise ConfigError(f"{name}{option} of the calibration is {getattr(limits, name):,}, it must be at least 1")
    found: list[tuple[int, ...]] = []
    left = limits.max_tokens
    for sample in _samples(source, limits, seed):
        ids = encoded(sample, tokenizer)
        sequence = (ids.prompt + ids.answer)[: min(left, limits.max_sequence_tokens)]
        if sequence:
            found.append(sequence)
            left -= len(sequence)
        if left == 0:
            break
    return found


def _samples(source: str, limits: TextLimits, seed: int) -> list[Sample]:
    if source == BUILT_IN:
        return [item_sample(item) for item in seen_items(limits.max_sequences, seed)]
    return drawn(read_samples(Path(source)), limits.max_sequences, seed)
