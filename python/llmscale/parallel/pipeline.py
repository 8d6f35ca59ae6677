"""Where the stages of a pipeline meet: the residual stream goes from one to the next, sampled ids from last to first.

Both go between ranks of the same number within their stages: through channels in shared memory where both run on one
host (about 10 us a message, where gloo takes 100 to 1,800), over TCP streams between hosts; one pipeline may use both
kinds. GPUs use torch.distributed. A send does not wait for its receiver, who may be at another group's step, but for
room in the system's buffers. Every wait has an end. It does not know steps: the caller receives in the order in which
the other side sends.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from typing import Protocol

import torch.distributed
from torch import Tensor

from llmscale._core import RankChannel, RankStreams


class Edge(Protocol):
    """One way from a rank to another, for the sender or for the receiver. Raises WorkerError or RuntimeError."""

    def send(self, tensor: Tensor) -> None:
        """Hands a contiguous tensor over, which may be overwritten afterwards."""

    def receive(self, out: Tensor) -> None:
        """Fills a contiguous tensor of the shape and type that the other side sends."""


class ChannelEdge:
    """Between ranks of one host, in shared memory."""

    def __init__(self, channel: RankChannel) -> None:
        self._channel = channel

    def send(self, tensor: Tensor) -> None:
        """See `Edge`."""
        self._channel.send(_memory(tensor))

    def receive(self, out: Tensor) -> None:
        """See `Edge`."""
        self._channel.receive(_memory(out))


def _memory(tensor: Tensor) -> tuple[int, int]:
    assert tensor.is_contiguous(), tensor.shape
    return tensor.data_ptr(), tensor.nbytes


class StreamEdge:
    """Between ranks of several hosts on CPUs, over a TCP stream.

    A message beyond the system's buffers, some megabytes, waits until its receiver reads. That cannot go round in a
    circle: what comes back from the last stage to the first is ids, a few bytes per row.
    """

    def __init__(self, streams: RankStreams) -> None:
        self._streams = streams

    def send(self, tensor: Tensor) -> None:
        """See `Edge`."""
        self._streams.send(_memory(tensor))

    def receive(self, out: Tensor) -> None:
        """See `Edge`."""
        self._streams.receive(_memory(out))


class TorchEdge:
    """Between ranks with GPUs on several hosts, over a process group of both; its time-out bounds every wait."""

    def __init__(self, group: torch.distributed.ProcessGroup, peer: int, max_sends: int) -> None:
        """`max_sends` is how many may be on their way; one more waits for the oldest."""
        self._group = group
        self._peer = peer
        self._max_sends = max_sends
        self._on_its_way: deque[tuple[torch.distributed.Work, Tensor]] = deque()

    def send(self, tensor: Tensor) -> None:
        """See `Edge`."""
        while self._on_its_way and (len(self._on_its_way) >= self._max_sends or self._on_its_way[0][0].is_completed()):
            self._on_its_way.popleft()[0].wait()
        # The caller's tensor is overwritten by its next step.
        held = tensor.clone()
        work = torch.distributed.isend(held, group=self._group, group_dst=self._peer)
        assert work is not None, "both ranks are of the group"
        self._on_its_way.append((work, held))

    def receive(self, out: Tensor) -> None:
        """See `Edge`."""
        torch.distributed.recv(out, group=self._group, group_src=self._peer)


@dataclass(slots=True)
class StageLink:
    """One rank's neighbours in the pipeline. An edge is None where the pipeline has none."""

    before: Edge | None
    """From the stage before; None in the first."""
    behind: Edge | None
    """To the stage behind; None in the last."""
    samples: Edge | None
    """From the last stage to the first; None in those between."""
    _waited_ns: int = 0

    def receive_stream(self, out: Tensor) -> None:
        """Fills [T, H] with what the stage before has computed."""
        assert self.before is not None, "the first stage embeds"
        started = time.perf_counter_ns()
        self.before.receive(out)
        self._waited_ns += time.perf_counter_ns() - started

    def take_waited_ns(self) -> int:
        """What `receive_stream` has waited since the last call: the bubble of a step."""
        waited_ns, self._waited_ns = self._waited_ns, 0
        return waited_ns

    def send_stream(self, stream: Tensor) -> None:
        """Hands [T, H] to the stage behind. The tensor may be overwritten afterwards."""
        assert self.behind is not None, "the last stage samples"
        self.behind.send(stream)

    def send_tokens(self, tokens: Tensor) -> None:
        """From the last stage: int32 [R], the ids of a step, -1 where a row has none. May be overwritten afterwards."""
        assert self.samples is not None, "only the last stage samples"
        self.samples.send(tokens)

    def receive_tokens(self, out: Tensor) -> None:
        """In the first stage: what `send_tokens` sent, in the order of steps."""
        assert self.samples is not None, "only the first stage asks for ids"
        self.samples.receive(out)
