"""Where the stages of a pipeline meet: the residual stream goes from one to the next, sampled ids from last to first.

Both go between ranks of the same number within their stages, point to point over torch.distributed. A time-out of the
process group ends a wait. It does not know steps: the caller receives in the order in which the other side sends.
"""

from __future__ import annotations

from typing import Protocol

import torch.distributed
from torch import Tensor

from llmscale.models.shard import RankPlace


class StageLink(Protocol):
    """One rank's neighbours in the pipeline."""

    def receive_stream(self, out: Tensor) -> None:
        """Fills [T, H] with what the stage before has computed."""

    def send_stream(self, stream: Tensor) -> None:
        """Hands [T, H] to the stage behind. The tensor may be overwritten afterwards."""

    def send_tokens(self, tokens: Tensor) -> None:
        """From the last stage: int32 [R], the ids of a step, -1 where a row has none."""

    def receive_tokens(self, out: Tensor) -> None:
        """In the first stage: what `send_tokens` sent, in the order of steps."""


class TorchStageLink:
    """Stages over a process group of torch.distributed that holds every rank of the replica."""

    def __init__(self, group: torch.distributed.ProcessGroup, place: RankPlace) -> None:
        self._group = group
        self._before = place.rank - place.tensor_size
        self._behind = place.rank + place.tensor_size
        self._first = place.tensor_rank
        self._last = (place.stages - 1) * place.tensor_size + place.tensor_rank

    def receive_stream(self, out: Tensor) -> None:
        """See `StageLink`."""
        torch.distributed.recv(out, group=self._group, group_src=self._before)

    def send_stream(self, stream: Tensor) -> None:
        """See `StageLink`."""
        torch.distributed.send(stream, group=self._group, group_dst=self._behind)

    def send_tokens(self, tokens: Tensor) -> None:
        """See `StageLink`."""
        torch.distributed.send(tokens, group=self._group, group_dst=self._first)

    def receive_tokens(self, out: Tensor) -> None:
        """See `StageLink`."""
        torch.distributed.recv(out, group=self._group, group_src=self._last)
