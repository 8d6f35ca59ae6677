"""Sampling on a rank: the last stage samples at the end of a step, the first learns of it before it needs the ids.

All ranks of the last stage hold the same logits and draw the same ids, since random numbers depend on the request
alone; the leader tells the engine. With several stages the ids go on to the first, which asks for them when the same
group of sequences has its next step: in between it computes other groups, and waits for nobody.
Costs one call of the core, and one message per step between stages. It does not know layers or logits' values.
"""

from __future__ import annotations

import torch

from llmscale._core import StepCounts, WorkerSession
from llmscale.worker.model_runner import ModelRunner


class StepSampling:
    """Begins and ends the steps of one session."""

    def __init__(self, session: WorkerSession, runner: ModelRunner, max_samples: int) -> None:
        self._session = session
        self._runner = runner
        self._ids = torch.zeros(max_samples, dtype=torch.int32)

    def begin(self) -> None:
        """Fills in what this step's sequences have sampled before; on the first stage of several only."""
        runner = self._runner
        if runner.stage is None or not runner.place.is_first_stage:
            return
        while (samples := self._session.awaited_samples()) is not None:
            ids = self._ids[:samples]
            runner.stage.receive_tokens(ids)
            self._session.record((ids.data_ptr(), ids.numel()))

    def finish(self, counts: StepCounts, logits: tuple[int, int]) -> None:
        """Draws, records and tells; `logits` is (address, elements)."""
        runner, place = self._runner, self._runner.place
        ids = self._ids[: counts.samples]
        memory = (ids.data_ptr(), ids.numel())
        if place.is_last_stage:
            waited_ns = 0 if runner.stage is None else runner.stage.take_waited_ns()
            self._session.sample(
                runner.kernels, logits, runner.dtype, reply=place.is_leader, tokens=memory, waited_ns=waited_ns
            )
            if runner.stage is not None and counts.samples > 0:
                runner.stage.send_tokens(ids)
        elif not place.is_first_stage:
            self._session.pass_over_samples()
