"""Sampling on a rank: the last stage samples at the end of a step, the first learns of it before it needs the ids.

The rows that sample are dealt to the ranks of the last stage: each draws its share and tells the others what it drew, a
few bytes per row. A token depends on its row's logits and its request alone, so nothing else changes with the number of
ranks; the leader tells the engine. With several stages the ids go on to the first, which asks for them when the same
group of sequences has its next step: in between it computes other groups, and waits for nobody.
Costs two calls of the core, one exchange of words among ranks, and one message per step between stages. It does not
know layers or logits' values.
"""

from __future__ import annotations

import torch

from llmscale._core import StepCounts, WorkerSession
from llmscale.parallel.tensor import row_bounds
from llmscale.worker.model_runner import ModelRunner
from llmscale.worker.steps import Steps


class StepSampling:
    """Begins and ends the steps of one session."""

    def __init__(self, session: WorkerSession, runner: ModelRunner, steps: Steps, max_samples: int) -> None:
        self._session = session
        self._steps = steps
        self._runner = runner
        self._ids = torch.zeros(max_samples, dtype=torch.int32)
        self._words = torch.zeros(max_samples * WorkerSession.MAX_ROW_WORDS, dtype=torch.int32)

    def begin(self) -> None:
        """Fills in what this step's sequences have sampled before; on the first stage of several only."""
        runner = self._runner
        if runner.stage is None or not runner.place.is_first_stage:
            return
        while (samples := self._session.awaited_samples()) is not None:
            ids = self._ids[:samples]
            runner.stage.receive_tokens(ids)
            self._session.record((ids.data_ptr(), ids.numel()))

    def finish(self, counts: StepCounts) -> None:
        """Draws for the rows that are dealt to this rank, records and tells."""
        place = self._runner.place
        if place.is_last_stage:
            self._sample(counts.samples)
        elif not place.is_first_stage:
            self._session.pass_over_samples()

    def _sample(self, samples: int) -> None:
        session, runner, place = self._session, self._runner, self._runner.place
        rows = row_bounds(samples, place.tensor_size)
        words = (self._words.data_ptr(), self._words.numel())
        parts = self._steps.draw(rows, place.tensor_rank, words)
        runner.tensor.gather_words(self._words[: parts[-1]], parts)
        waited_ns = 0 if runner.stage is None else runner.stage.take_waited_ns()
        ids = self._ids[:samples]
        tokens = (ids.data_ptr(), ids.numel())
        session.complete(words, reply=place.is_leader, tokens=tokens, waited_ns=waited_ns)
        if runner.stage is not None and samples > 0:
            runner.stage.send_tokens(ids)
