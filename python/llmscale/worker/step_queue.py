"""Steps of one source in their order: begun as they come, answered when they are done.

A processor has computed a step when it has begun it, and answers at once. A device goes on alone: while it computes a
step, the next one, whose rows read what that step samples, is expanded, packed and launched, and only then the first
one's ids are read and told. So the device has its next step when it is done with one. Whatever else a step needs is
there once everything in front of it is answered. What a step that raised leaves unanswered in front of it is answered
first, because whoever plans takes a step that raised for its oldest. O(1) per step. It does not know what a step is.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

from llmscale._core import DiskRegion, HostRegion, StepCounts
from llmscale.worker.host_tier import CopySource
from llmscale.worker.steps import Steps

if TYPE_CHECKING:
    from llmscale.worker.device_tier import Copy


class Copier(Protocol):
    """Makes a step's copies between tiers. See `Runner.copy`."""

    def copy(self, counts: StepCounts, source: CopySource) -> bool: ...


class StepQueue:
    """Begins the steps of a source, and has each answered by `answer`."""

    def __init__(self, copier: Copier, steps: Steps, source: CopySource, answer: Callable[[StepCounts], None]) -> None:
        self._copier = copier
        self._steps = steps
        self._source = _AnsweredFirst(source, self)
        self._answer = answer
        self._open: deque[StepCounts] = deque()

    @property
    def is_empty(self) -> bool:
        """Whether everything is answered."""
        return not self._open

    @property
    def is_done(self) -> bool:
        """Whether the oldest step can be answered without waiting."""
        return self._steps.is_done

    def take(self, counts: StepCounts, before: Callable[[], None] | None = None) -> bool:
        """Begins the step that the source holds, and answers what need not stay open. `before` is called when its
        copies are made. False: bad host blocks made its copies void, it was given up, and whoever plans knows."""
        try:
            if not self._copier.copy(counts, self._source):
                return False
            if before is not None:
                before()
            if not self._steps.compute(counts):
                self.answer()
                begun = self._steps.compute(counts)
                assert begun, "a step that has none in front of it can begin"
        except Exception:
            self.answer()
            raise
        self._open.append(counts)
        self.answer(self._steps.ahead)
        return True

    def answer(self, keep: int = 0) -> None:
        """Answers steps, the oldest first, until as many are open; waits for them."""
        while len(self._open) > keep:
            self._answer(self._open.popleft())

    def forget(self) -> None:
        """Nobody asks for what is open any more."""
        self._open.clear()
        self._steps.forget()


class _AnsweredFirst:
    """A source that is told of bad blocks when all in front of their step is answered."""

    def __init__(self, source: CopySource, queue: StepQueue) -> None:
        self._source = source
        self._queue = queue

    def copy_blocks(self, host: HostRegion, kv: tuple[int, int], disk: DiskRegion | None = None) -> bool:
        """See `CopySource`."""
        return self._source.copy_blocks(host, kv, disk)

    def copies(self, disk: DiskRegion | None = None) -> list[Copy]:
        """See `CopySource`."""
        return self._source.copies(disk)

    def copies_made(self, took_ns: int, bad_host_blocks: Sequence[int], disk: DiskRegion | None = None) -> bool:
        """See `CopySource`."""
        if bad_host_blocks:
            self._queue.answer()
        return self._source.copies_made(took_ns, bad_host_blocks, disk)
