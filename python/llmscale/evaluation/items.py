"""The items of an evaluation: unseen questions of the embedded model, or samples of a file, as token ids.

Which items there are depends on the source, the limit and the seed alone, so that two models, or two days, are asked
the same. Linear in the items. It does not know models.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from llmscale.embedded.tasks.splits import unseen_items
from llmscale.errors import ConfigError
from llmscale.evaluation.scorer import ScoredRequest
from llmscale.samples import Sample, TextEncoder, drawn, encoded, item_sample, read_samples

TINY_CHAT = "tiny-chat"
TINY_CHAT_ITEMS = 2_000
"""Asked unless a limit is given: a standard error of half a point at 95 % right."""
MAX_ITEMS = 1_000_000


@dataclass(frozen=True, slots=True)
class EvaluationItem:
    """A prompt to answer and the answer that is right, or a text that is only scored."""

    task: str
    prompt: tuple[int, ...]
    target: tuple[int, ...]
    """Ids of the answer, or of the text."""
    answer: str | None

    @property
    def scored(self) -> ScoredRequest:
        """The tokens whose probabilities count: the answer's, or all of a text but the first."""
        return ScoredRequest(self.prompt + self.target, max(1, len(self.prompt)))

    @property
    def max_answer_tokens(self) -> int:
        """As many as another spelling of the right answer may take; what is longer is wrong anyway."""
        return 2 * len(self.target) + 8


def evaluation_items(
    source: str, tokenizer: TextEncoder, limit: int | None, seed: int, max_sequence_tokens: int
) -> list[EvaluationItem]:
    """The items of `source`, TINY_CHAT or a path. Raises ConfigError for one that does not fit the model."""
    if limit is not None and not 1 <= limit <= MAX_ITEMS:
        raise ConfigError(f"limit is {limit:,} items, it must be 1 to {MAX_ITEMS:,}")
    samples = _samples(source, limit, seed)
    return [_item(number, sample, tokenizer, max_sequence_tokens) for number, sample in enumerate(samples, start=1)]


def _samples(source: str, limit: int | None, seed: int) -> list[Sample]:
    if source == TINY_CHAT:
        return [item_sample(item) for item in unseen_items(limit or TINY_CHAT_ITEMS, seed)]
    return drawn(read_samples(Path(source)), limit, seed)


def _item(number: int, sample: Sample, tokenizer: TextEncoder, max_sequence_tokens: int) -> EvaluationItem:
    ids = encoded(sample, tokenizer)
    item = EvaluationItem(sample.task, ids.prompt, ids.answer, sample.answer)
    needed = len(ids.prompt) + (len(ids.answer) if sample.answer is None else item.max_answer_tokens)
    if needed > max_sequence_tokens:
        raise ConfigError(
            f"item {number:,} needs {needed:,} tokens with room for its answer, the model allows"
            f" {max_sequence_tokens:,}; shorten it or leave it out"
        )
    if len(ids.prompt) + len(ids.answer) < 2:
        raise ConfigError(f"item {number:,} has fewer than two tokens, so nothing of it can be predicted; leave it out")
    return item
