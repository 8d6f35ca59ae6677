"""Where the stages of a pipeline meet: the residual stream goes from one to the next, sampled ids from last to first.

Both go between ranks of the same number within their stages: through channels in shared memory on one host (about 10 us
a message, where gloo takes 100 to 1,800), else point to point over torch.distributed. A send does not wait for its
receiver, who may be at another group's step. Every wait has an end. It does not know steps: the caller receives in the
order in which the other side sends.
"""

from __future__ import annotations

import time
from collections import deque
from typing import Protocol

import torch.distributed
from torch import Tensor

from llmscale._core import RankChannel
from llmscale.errors import WorkerError
from llmscale.models.shard import RankPlace
from llmscale.parallel.assignment import Meeting


class StageLink(Protocol):
    """One rank's neighbours in the pipeline."""

    def receive_stream(self, out: Tensor) -> None:
        """Fills [T, H] with what the stage before has computed."""

    def take_waited_ns(self) -> int:
        """What `receive_stream` has waited since the last call: the bubble of a step."""

    def send_stream(self, stream: Tensor) -> None:
        """Hands [T, H] to the stage behind. The tensor may be overwritten afterwards."""

    def send_tokens(self, tokens: Tensor) -> None:
        """From the last stage: int32 [R], the ids of a step, -1 where a row has none. May be overwritten afterwards."""

    def receive_tokens(self, out: Tensor) -> None:
        """In the first stage: what `send_tokens` sent, in the order of steps."""


class ChannelStageLink:
    """Stages of one host."""

    def __init__(self, place: RankPlace, meeting: Meeting) -> None:
        """Raises WorkerError for a meeting without the channels that the place needs."""
        first, last = place.tensor_rank, (place.stages - 1) * place.tensor_size + place.tensor_rank
        max_wait_us = int(meeting.max_wait_seconds * 1e6)

        def channel(path: str | None, peer: int) -> RankChannel:
            if path is None:
                raise WorkerError(f"rank {place.rank} was not told how it meets rank {peer}")
            return RankChannel(path, peer, max_wait_us=max_wait_us)

        self._before = None if place.is_first_stage else channel(meeting.before, place.rank - place.tensor_size)
        self._behind = None if place.is_last_stage else channel(meeting.behind, place.rank + place.tensor_size)
        ends = place.is_first_stage or place.is_last_stage
        self._samples = channel(meeting.samples, first if place.is_last_stage else last) if ends else None
        self._waited_ns = 0

    def receive_stream(self, out: Tensor) -> None:
        """See `StageLink`."""
        assert self._before is not None, "the first stage embeds"
        started = time.perf_counter_ns()
        self._before.receive(_memory(out))
        self._waited_ns += time.perf_counter_ns() - started

    def take_waited_ns(self) -> int:
        """See `StageLink`."""
        waited_ns, self._waited_ns = self._waited_ns, 0
        return waited_ns

    def send_stream(self, stream: Tensor) -> None:
        """See `StageLink`."""
        assert self._behind is not None, "the last stage samples"
        self._behind.send(_memory(stream))

    def send_tokens(self, tokens: Tensor) -> None:
        """See `StageLink`."""
        assert self._samples is not None, "only the last stage samples"
        self._samples.send(_memory(tokens))

    def receive_tokens(self, out: Tensor) -> None:
        """See `StageLink`."""
        assert self._samples is not None, "only the first stage asks for ids"
        self._samples.receive(_memory(out))


def _memory(tensor: Tensor) -> tuple[int, int]:
    assert tensor.is_contiguous(), tensor.shape
    return tensor.data_ptr(), tensor.nbytes


class TorchStageLink:
    """Stages over a process group of torch.distributed that holds every rank of the replica."""

    def __init__(self, group: torch.distributed.ProcessGroup, place: RankPlace) -> None:
        self._group = group
        self._before = place.rank - place.tensor_size
        self._behind = place.rank + place.tensor_size
        self._first = place.tensor_rank
        self._last = (place.stages - 1) * place.tensor_size + place.tensor_rank
        self._waited_ns = 0
        self._on_its_way: deque[tuple[torch.distributed.Work, Tensor]] = deque()
        # A step in flight takes one send of each rank; more can only be those whose end was not looked at yet.
        self._max_sends = place.stages

    def receive_stream(self, out: Tensor) -> None:
        """See `StageLink`."""
        started = time.perf_counter_ns()
        torch.distributed.recv(out, group=self._group, group_src=self._before)
        self._waited_ns += time.perf_counter_ns() - started

    def take_waited_ns(self) -> int:
        """See `StageLink`."""
        waited_ns, self._waited_ns = self._waited_ns, 0
        return waited_ns

    def send_stream(self, stream: Tensor) -> None:
        """See `StageLink`."""
        self._send(stream, self._behind)

    def send_tokens(self, tokens: Tensor) -> None:
        """See `StageLink`."""
        self._send(tokens, self._first)

    def receive_tokens(self, out: Tensor) -> None:
        """See `StageLink`."""
        torch.distributed.recv(out, group=self._group, group_src=self._last)

    def _send(self, tensor: Tensor, to: int) -> None:
        while self._on_its_way and (len(self._on_its_way) >= self._max_sends or self._on_its_way[0][0].is_completed()):
            self._on_its_way.popleft()[0].wait()
        # The caller's tensor is overwritten by its next step.
        held = tensor.clone()
        work = torch.distributed.isend(held, group=self._group, group_dst=to)
        assert work is not None, "both ranks are of the group"
        self._on_its_way.append((work, held))
