"""Sampling on a rank: the last stage samples at the end of a step, the first learns of it before it needs the ids.

The rows that sample are dealt to the ranks of the last stage: each draws its share and tells the others what it drew, a
few bytes per row. A token depends on its row's logits and its request alone, so nothing else changes with the number of
ranks; the leader tells the engine. With several stages the ids go on to the first, which asks for them when the same
group of sequences has its next step: in between it computes other groups, and waits for nobody.
Costs two calls of the core, one exchange of words among ranks, and one message per step between stages. It does not
know layers or logits' values.
"""

from __future__ import annotations

from array import array

from llmscale._core import StepCounts, WorkerSession
from llmscale.parallel.layout import row_bounds
from llmscale.worker.runner import Runner
from llmscale.worker.steps import Steps


class StepSampling:
    """Begins and ends the steps of one session."""

    def __init__(self, session: WorkerSession, runner: Runner, steps: Steps, max_samples: int) -> None:
        self._session = session
        self._steps = steps
        self._runner = runner
        self._ids = zeroed_words(max_samples)
        self._words = zeroed_words(max_samples * WorkerSession.MAX_ROW_WORDS)

    def begin(self) -> None:
        """Fills in what this step's sequences have sampled before; on the first stage of several only."""
        exchange = self._runner.exchange
        if exchange is None or not exchange.has_stages or not self._runner.place.is_first_stage:
            return
        while (samples := self._session.awaited_samples()) is not None:
            exchange.receive_ids(self._ids, samples)
            self._session.record((self._ids.buffer_info()[0], samples))

    def finish(self, counts: StepCounts) -> None:
        """Draws for the rows that are dealt to this rank, records and tells."""
        place = self._runner.place
        if place.is_last_stage:
            self._sample(counts.samples)
            return
        # Nobody draws here: a step that stayed open would hold up the next one that has a new sequence, for ever.
        self._steps.forget()
        self._session.leave_answers()
        if not place.is_first_stage:
            self._session.pass_over_samples()

    def _sample(self, samples: int) -> None:
        session, exchange, place = self._session, self._runner.exchange, self._runner.place
        rows = row_bounds(samples, place.tensor_size)
        words = self._words.buffer_info()
        parts = self._steps.draw(rows, place.tensor_rank, words)
        if exchange is None:
            session.complete(words)
            return
        exchange.gather_words(self._words, parts)
        tokens = (self._ids.buffer_info()[0], samples)
        session.complete(words, reply=place.is_leader, tokens=tokens, waited_ns=exchange.take_waited_ns())
        if exchange.has_stages:
            exchange.send_ids(self._ids, samples)


def zeroed_words(entries: int) -> array[int]:
    """Memory of int32 that the core fills by its address."""
    words = array("i", bytes(4 * entries))
    assert words.itemsize == 4, words.itemsize
    return words
