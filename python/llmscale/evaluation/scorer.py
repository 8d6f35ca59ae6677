"""Log probabilities of given tokens under a model, by the executor and the products that serve it, native or torch.

Sequences are packed into steps as prefill, long ones in chunks, and only rows that are asked for go to the head. Costs
one prefill of all tokens; memory is the model's, a KV region for one pack, and the logits of one step. It runs on the
CPU. It does not know texts, items or what the numbers are used for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmscale.evaluation.executors import ModelChoice, scoring_executor
from llmscale.models.registry import describe_model
from llmscale.worker.kv_layout import DEFAULT_BLOCK_TOKENS
from llmscale.worker.step import StepInputs, StepLimits

MAX_STEP_TOKENS = 512
"""Also the most rows of logits at once: with a vocabulary of 152k they take 0.3 GB in float32."""
MAX_PACKED = 64
"""Sequences of one step."""


@dataclass(frozen=True, slots=True)
class ScoredRequest:
    """Tokens, and the first one whose probability is wanted; those before it are context. At least one is before."""

    tokens: tuple[int, ...]
    first: int

    @property
    def targets(self) -> tuple[int, ...]:
        """The tokens whose probabilities are wanted."""
        return self.tokens[self.first :]


class Scorer:
    """A model on the CPU that says how likely tokens are."""

    def __init__(self, choice: ModelChoice, *, max_sequence_tokens: int | None = None) -> None:
        """Raises ModelError and ConfigError as serving the folder would."""
        spec = describe_model(choice.folder, choice.quantization).spec
        self.vocabulary = spec.vocabulary
        self.max_sequence_tokens = spec.sequence_limit(max_sequence_tokens)
        limits = StepLimits(MAX_STEP_TOKENS, MAX_STEP_TOKENS, self.max_sequence_tokens)
        blocks = -(-self.max_sequence_tokens // DEFAULT_BLOCK_TOKENS) + MAX_STEP_TOKENS // DEFAULT_BLOCK_TOKENS
        blocks += MAX_PACKED
        self._executor = scoring_executor(choice, limits, blocks)
        self.weight_bytes = self._executor.weight_bytes
        self._tables = torch.arange(blocks, dtype=torch.int32)

    def log_probabilities(self, requests: Sequence[ScoredRequest]) -> Iterator[tuple[int, int, Tensor]]:
        """(request's index, first of its targets that is here, log probabilities [n, vocabulary] float32), in order.

        A tensor is valid until the next one is taken. Requests must fit `max_sequence_tokens`.
        """
        pack: list[int] = []
        size = 0
        for index, request in enumerate(requests):
            assert 1 <= request.first <= len(request.tokens) <= self.max_sequence_tokens, request.first
            if pack and (size + len(request.tokens) > MAX_STEP_TOKENS or len(pack) == MAX_PACKED):
                yield from self._run(requests, pack)
                pack, size = [], 0
            pack.append(index)
            size += len(request.tokens)
        if pack:
            yield from self._run(requests, pack)

    def _run(self, requests: Sequence[ScoredRequest], pack: Sequence[int]) -> Iterator[tuple[int, int, Tensor]]:
        """One step, or several over a single sequence that is longer than a step."""
        longest = max(len(requests[index].tokens) for index in pack)
        assert longest <= MAX_STEP_TOKENS or len(pack) == 1, (longest, len(pack))
        for start in range(0, longest, MAX_STEP_TOKENS):
            parts = [(requests[index], range(start, min(start + MAX_STEP_TOKENS, longest))) for index in pack]
            parts = [(request, range(start, min(span.stop, len(request.tokens)))) for request, span in parts]
            step = self._step(parts)
            logits = self._executor.forward(step)
            row = 0
            for index, (request, span) in zip(pack, parts, strict=True):
                wanted = _wanted(request, span)
                if len(wanted) > 0:
                    rows = logits[row : row + len(wanted)].float()
                    yield index, wanted.start + 1 - request.first, rows.log_softmax(dim=-1)
                row += len(wanted)

    def _step(self, parts: Sequence[tuple[ScoredRequest, range]]) -> StepInputs:
        tokens: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        starts, offsets, samples = [0], [], []
        block = 0
        for request, span in parts:
            offsets.append(block)
            samples += [starts[-1] + place - span.start for place in _wanted(request, span)]
            tokens += request.tokens[span.start : span.stop]
            positions += span
            slots += [block * DEFAULT_BLOCK_TOKENS + place for place in span]
            starts.append(starts[-1] + len(span))
            block += -(-span.stop // DEFAULT_BLOCK_TOKENS)
        return StepInputs(
            rows=len(tokens),
            sequences=len(parts),
            samples=len(samples),
            token_ids=_int32(tokens),
            positions=_int32(positions),
            slot_mapping=_int32(slots),
            query_start=_int32(starts),
            sequence_lengths=_int32([span.stop for _, span in parts]),
            table_offsets=_int32(offsets),
            block_tables=self._tables,
            sample_rows=_int32(samples),
        )


def _wanted(request: ScoredRequest, span: range) -> range:
    """Positions of a span whose next token is wanted; the last token has no next one."""
    return range(max(span.start, request.first - 1), min(span.stop, len(request.tokens) - 1))


def _int32(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)
