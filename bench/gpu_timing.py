"""Times on a CUDA device: replays of a graph between events, so that neither Python nor launches are measured.

Inputs rotate through more memory than a cache holds, and are random: a device runs faster on zeros. Knows nothing of
what it times. Every figure is a spread over replays.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch

from bench.statistics import Spread, spread

DEVICE = torch.device("cuda")
"""Tests put the CPU here, where nothing is measured but all cases run."""
Stream = torch.cuda.Stream
REPLAYS = 15
ROTATING_BYTES = 512 << 20
"""More than the L2 cache of any device so far (126 MB on a B200)."""


class Budget:
    """Of one section; cases that would begin after its end are left out, and the section says how many."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds
        self.left_out = 0

    def allows(self) -> bool:
        """Counts what it does not allow."""
        if time.monotonic() < self._end:
            return True
        self.left_out += 1
        return False


def graph_microseconds(calls: Sequence[Callable[[], object]], rounds: int | None = None) -> Spread:
    """Of one call, where each is captured `rounds` times one after the other (default: about 40 calls in all)."""
    rounds = rounds or max(1, 40 // len(calls))
    stream = new_stream()
    # Inputs were made on the default stream, which this one does not wait for: indices that are not there yet would be
    # followed anywhere.
    synchronize()
    with on_stream(stream):
        # All of them: what a kernel is compiled for may depend on a layer's number, and no module loads in a capture.
        for call in calls:
            call()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(rounds):
                for call in calls:
                    call()
        for _ in range(3):
            graph.replay()
        return spread([elapsed_microseconds(graph.replay, stream) / (rounds * len(calls)) for _ in range(REPLAYS)])


def stream_microseconds(call: Callable[[], object], stream: Stream, repeats: int = 5) -> Spread:
    """Of a call that cannot be captured, such as a batch of the copy engine."""
    synchronize()
    with on_stream(stream):
        call()
        return spread([elapsed_microseconds(call, stream) for _ in range(repeats)])


def peer_microseconds(calls: Sequence[Callable[[], object]]) -> float | str:
    """The median of somebody else's calls, or why there is none: what torch cannot do must not cost our own figures."""
    try:
        return graph_microseconds(calls).median
    except (RuntimeError, ValueError, TypeError) as error:
        return (str(error).splitlines() or [type(error).__name__])[0][:80]


def inverted(measured: Spread, amount: float) -> Spread:
    """`amount` per microsecond: bytes become MB/s, divided by 1e3 before GB/s."""
    return Spread(amount / measured.median, amount / measured.high, amount / measured.low, measured.repeats)


def ceilings() -> dict[str, float]:
    """What this device can do: copy (read and write), bfloat16 products, and the link in both directions."""
    one = torch.empty(1 << 30, dtype=torch.uint8, device=DEVICE).random_()
    other = torch.empty_like(one)
    left, right = (torch.randn(8_192, 8_192, device=DEVICE).bfloat16() for _ in range(2))
    host = pinned(512 << 20)
    there = one[: host.numel()]
    copied = graph_microseconds([lambda: other.copy_(one)], 2).median
    product = graph_microseconds([lambda: left @ right], 4).median
    down = graph_microseconds([lambda: there.copy_(host, non_blocking=True)], 1).median
    up = graph_microseconds([lambda: host.copy_(there, non_blocking=True)], 1).median
    return {
        "copy_gigabytes_per_second": 2 * one.numel() / copied / 1e3,
        "bf16_teraflops": 2 * 8_192**3 / product / 1e6,
        "host_to_device_gigabytes_per_second": host.numel() / down / 1e3,
        "device_to_host_gigabytes_per_second": host.numel() / up / 1e3,
    }


def new_stream() -> Stream:
    """Not the default one, on which the copy engine takes one copy at a time."""
    return torch.cuda.Stream()


def on_stream(stream: Stream) -> AbstractContextManager[None]:
    """What is started within goes to this stream."""
    entered: AbstractContextManager[None] = torch.cuda.stream(stream)
    return entered


def pinned(*shape: int) -> torch.Tensor:
    """uint8 in memory that a device reads and writes itself."""
    return torch.empty(shape, dtype=torch.uint8, pin_memory=True)


def synchronize() -> None:
    """Waits for all streams."""
    torch.cuda.synchronize()


def elapsed_microseconds(call: Callable[[], object], stream: Stream) -> float:
    """Of what one call starts on this stream, which must be the current one."""
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    before.record(stream)
    call()
    after.record(stream)
    after.synchronize()
    return float(before.elapsed_time(after)) * 1e3
