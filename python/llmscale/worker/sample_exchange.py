"""What ranks tell each other of a step's samples: words among those of the last stage, ids from there to the first.

Costs one exchange of words and one message per step. It wraps the memory that the sampling owns as tensors, because
groups and stages move tensors. It does not know what was drawn.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from llmscale.parallel.pipeline import StageLink
from llmscale.parallel.tensor import TensorGroup


class SampleExchange:
    """The ranks that one of several meets. See `llmscale.worker.runner.Exchange`."""

    def __init__(self, tensor: TensorGroup, stage: StageLink | None) -> None:
        self._tensor = tensor
        self._stage = stage

    @property
    def has_stages(self) -> bool:
        """Whether ids go on to another stage."""
        return self._stage is not None

    def gather_words(self, words: array[int], bounds: Sequence[int]) -> None:
        """Completes the words of all ranks of the stage."""
        self._tensor.gather_words(_tensor(words, bounds[-1]), bounds)

    def receive_ids(self, ids: array[int], count: int) -> None:
        """Waits for ids that the last stage has sampled."""
        if count > 0:
            self._link().receive_tokens(_tensor(ids, count))

    def send_ids(self, ids: array[int], count: int) -> None:
        """Hands ids to the first stage."""
        if count > 0:
            self._link().send_tokens(_tensor(ids, count))

    def take_waited_ns(self) -> int:
        """Time that this rank has waited for the stages before it."""
        return 0 if self._stage is None else self._stage.take_waited_ns()

    def _link(self) -> StageLink:
        assert self._stage is not None, "one stage has nobody to tell"
        return self._stage


def _tensor(memory: array[int], count: int) -> Tensor:
    return torch.frombuffer(memory, dtype=torch.int32)[:count]
