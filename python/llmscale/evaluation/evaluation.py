"""Evaluates a model on items, alone or beside a reference: greedy answers, perplexity, and how far the two are apart.

Models are held one after the other for answers, and side by side for the divergence, so that only one step's logits are
kept. Costs one prefill and one greedy answer per item and model. It does not know where items come from, or how results
are shown.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from llmscale.errors import ConfigError
from llmscale.evaluation.comparison import PairedCounts, paired
from llmscale.evaluation.executors import ModelChoice
from llmscale.evaluation.items import EvaluationItem
from llmscale.evaluation.scorer import Scorer
from llmscale.llm import LLM
from llmscale.types import SamplingParams

ANSWERED_TOGETHER = 512
"""Items between two reports of progress."""

Progress = Callable[[str, int, int], None]
"""Called with what is being done, items that are done, and all of them."""


@dataclass(frozen=True, slots=True)
class TaskScore:
    """Items of one task, and those that were answered exactly."""

    task: str
    right: int
    asked: int


@dataclass(frozen=True, slots=True)
class Divergence:
    """Of a model from its reference, per scored token: mean of sum p_reference log(p_reference / p_model), in nats, and
    the share of tokens whose most likely id is the same."""

    mean_nats: float
    same_best_share: float


@dataclass(frozen=True, slots=True)
class Scores:
    """A model's results. `perplexity` is over `scored_tokens` tokens of answers and texts."""

    weight_bytes: int
    perplexity: float
    scored_tokens: int
    graded: tuple[bool, ...]
    """Of the items with an answer, in order."""
    tasks: tuple[TaskScore, ...]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What came of it. The last three are there with a reference; `pairs` if any item has an answer."""

    model: Scores
    reference: Scores | None = None
    divergence: Divergence | None = None
    pairs: PairedCounts | None = None


def evaluate(
    model: ModelChoice,
    items: Sequence[EvaluationItem],
    reference: ModelChoice | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Raises ConfigError for a reference with another vocabulary, and ModelError as serving would."""
    assert len(items) > 0, "there are items"
    told = progress or (lambda _what, _done, _all: None)
    answers = graded_answers(model, items, lambda done, all_: told("answers", done, all_))
    if reference is None:
        return Evaluation(_scores(model, None, items, answers, None, told)[0])
    known = graded_answers(reference, items, lambda done, all_: told("answers of the reference", done, all_))
    own, other, divergence = _scores(model, reference, items, answers, known, told)
    return Evaluation(own, other, divergence, paired(answers, known) if answers else None)


def graded_answers(
    model: ModelChoice, items: Sequence[EvaluationItem], progress: Callable[[int, int], None]
) -> list[bool]:
    """Whether the greedy answer is the right one, surrounding space aside, for each item that has one."""
    asked = [item for item in items if item.answer is not None]
    if not asked:
        return []
    llm = LLM(
        model.folder,
        dtype=model.dtype,
        quantization=model.quantization,
        threads=model.threads,
        executor=model.executor,
        kv_dtype=model.kv_dtype,
        device="cpu",
        kv_host_bytes=0,
    )
    right: list[bool] = []
    for first in range(0, len(asked), ANSWERED_TOGETHER):
        some = asked[first : first + ANSWERED_TOGETHER]
        params = [SamplingParams(temperature=0, max_tokens=item.max_answer_tokens) for item in some]
        outputs = llm.generate([list(item.prompt) for item in some], params)
        texts = [output.outputs[0].text.strip() for output in outputs]
        right += [text == (item.answer or "").strip() for text, item in zip(texts, some, strict=True)]
        progress(len(right), len(asked))
    llm.close()
    return right


class _Sums:
    """Of the scored tokens so far."""

    def __init__(self) -> None:
        self.tokens = 0
        self.log_probability = 0.0

    def add(self, rows: torch.Tensor, targets: Sequence[int]) -> None:
        picked = rows.gather(1, torch.tensor(targets)[:, None])
        self.log_probability += float(picked.sum(dtype=torch.float64))
        self.tokens += len(targets)

    @property
    def perplexity(self) -> float:
        return math.exp(-self.log_probability / self.tokens)


def _scores(
    model: ModelChoice,
    reference: ModelChoice | None,
    items: Sequence[EvaluationItem],
    answers: Sequence[bool],
    known: Sequence[bool] | None,
    told: Progress,
) -> tuple[Scores, Scores | None, Divergence | None]:
    requests = [item.scored for item in items]
    # Not the model's longest: room for its 131,072 tokens takes 17 GB of an 8B model's keys and values.
    longest = max(2, *(len(request.tokens) for request in requests))
    own, sums = Scorer(model, max_sequence_tokens=longest), _Sums()
    if reference is None or known is None:
        for index, first, rows in own.log_probabilities(requests):
            sums.add(rows, requests[index].targets[first : first + rows.shape[0]])
            told("probabilities", index + 1, len(requests))
        return _model_scores(own, sums, items, answers), None, None
    other, other_sums = Scorer(reference, max_sequence_tokens=longest), _Sums()
    if own.vocabulary != other.vocabulary:
        raise ConfigError(
            f"the model has a vocabulary of {own.vocabulary:,} ids, the reference of {other.vocabulary:,}: their"
            " probabilities cannot be compared. Give the model that this one was made from."
        )
    nats, same = 0.0, 0
    both = zip(own.log_probabilities(requests), other.log_probabilities(requests), strict=True)
    for (index, first, rows), (_, _, others) in both:
        targets = requests[index].targets[first : first + rows.shape[0]]
        sums.add(rows, targets)
        other_sums.add(others, targets)
        nats += float((others.exp() * (others - rows)).sum(dtype=torch.float64))
        same += int((rows.argmax(dim=1) == others.argmax(dim=1)).sum())
        told("probabilities", index + 1, len(requests))
    divergence = Divergence(nats / sums.tokens, same / sums.tokens)
    return _model_scores(own, sums, items, answers), _model_scores(other, other_sums, items, known), divergence


def _model_scores(scorer: Scorer, sums: _Sums, items: Sequence[EvaluationItem], graded: Sequence[bool]) -> Scores:
    tasks: dict[str, list[bool]] = {}
    asked = [item for item in items if item.answer is not None]
    for item, right in zip(asked, graded, strict=True):
        tasks.setdefault(item.task, []).append(right)
    table = tuple(TaskScore(task, sum(rights), len(rights)) for task, rights in tasks.items())
    return Scores(scorer.weight_bytes, sums.perplexity, sums.tokens, tuple(graded), table)
