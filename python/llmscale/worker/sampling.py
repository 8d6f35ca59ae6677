"""The end of a step on a rank: the last stage samples, the first learns what was sampled.

All ranks of the last stage hold the same logits and draw the same ids, since random numbers depend on the request
alone; the leader tells the engine. With several stages the ids go on to the first, which needs them for the next step.
Costs one call of the core, and one message per step between stages. It does not know layers or logits' values.
"""

from __future__ import annotations

import torch

from llmscale._core import StepCounts, WorkerSession
from llmscale.worker.model_runner import ModelRunner


class StepSampling:
    """Ends the steps of one session."""

    def __init__(self, session: WorkerSession, runner: ModelRunner, max_samples: int) -> None:
        self._session = session
        self._runner = runner
        self._ids = torch.zeros(max_samples, dtype=torch.int32)

    def finish(self, counts: StepCounts, logits: tuple[int, int]) -> None:
        """Draws, records and tells; `logits` is (address, elements)."""
        runner, place = self._runner, self._runner.place
        ids = self._ids[: counts.samples]
        memory = (ids.data_ptr(), ids.numel())
        if place.is_last_stage:
            self._session.sample(runner.kernels, logits, runner.dtype, reply=place.is_leader, tokens=memory)
        if runner.stage is None or counts.samples == 0:
            return
        if place.is_last_stage:
            runner.stage.send_tokens(ids)
        elif place.is_first_stage:
            runner.stage.receive_tokens(ids)
            self._session.record(memory)
