"""CUDA's streams, events, graphs and pinned memory as `Accelerator` has them: torch's, or the driver's.

All streams are torch's own, none the default one, on which batched copies fall back to single calls. Graphs share one
memory pool, so that they take as much as the largest. A few microseconds per call. It does not know what work is.
"""

from __future__ import annotations

import ctypes
import time
import weakref
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from llmscale.cuda.block_copier import BlockCopier, Regions
from llmscale.cuda.device import CudaDevice
from llmscale.devices.interface import DeviceSampler, Event, Graph, MemoryFigures, Work
from llmscale.errors import WorkerError

MIN_SCRATCH_BLOCKS = 8
MAX_SCRATCH_BLOCKS = 128
MAX_SCRATCH_BYTES = 32 << 20
"""For calibration on either side: 8 blocks of an 8B-shaped model, 4 MiB each, take a millisecond at 32 GB/s."""


class CudaEvent:
    """See `Event`."""

    __slots__ = ("torch",)

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self.torch = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]  # torch's
        self.torch.record(stream)

    def wait(self) -> None:
        """See `Event`."""
        self.torch.synchronize()

    @property
    def is_done(self) -> bool:
        """See `Event`."""
        return bool(self.torch.query())  # type: ignore[no-untyped-call]  # torch's

    def elapsed_ns_since(self, earlier: Event) -> int:
        """See `Event`."""
        assert isinstance(earlier, CudaEvent), earlier
        return int(earlier.torch.elapsed_time(self.torch) * 1e6)


class CudaStream:
    """See `Stream`."""

    def __init__(self, launcher: CudaDevice, device: torch.device) -> None:
        self.torch = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch's
        self._launcher = launcher
        self._copier = BlockCopier(launcher, device)

    def run(self, work: Work) -> None:
        """See `Stream`."""
        with torch.cuda.stream(self.torch):
            work()

    def copy(self, source: Tensor, target: Tensor) -> None:
        """See `Stream`."""
        with torch.cuda.stream(self.torch):
            target.copy_(source, non_blocking=True)

    def copy_blocks(self, source: Tensor, target: Tensor, pairs: Sequence[tuple[int, int]]) -> None:
        """See `Stream`. Neighbours become one copy where rows have no gaps."""
        sources, targets = ([pair[side] for pair in pairs] for side in (0, 1))
        with torch.cuda.stream(self.torch):
            if source.is_contiguous() and target.is_contiguous():
                self._copier.copy(Regions(source, target), sources, targets)
                return
            self._launcher.copy_batch(
                [target[row].data_ptr() for row in targets],
                [source[row].data_ptr() for row in sources],
                [source.shape[1]] * len(pairs),
            )

    def calibrate(self, source: Tensor, target: Tensor, has_time: Callable[[], bool]) -> str:
        """Measures how rows of these regions are best copied; `target` is overwritten. Says what was found."""

        def elapsed_ns(start: Callable[[], None]) -> int:
            before = self.record()
            start()
            after = self.record()
            after.wait()
            return after.elapsed_ns_since(before)

        with torch.cuda.stream(self.torch):
            self._copier.calibrate(Regions(source, target), elapsed_ns, has_time)
        return self._copier.summary(source.shape[1])

    def record(self) -> Event:
        """See `Stream`."""
        return CudaEvent(self.torch)

    def wait_for(self, event: Event) -> None:
        """See `Stream`."""
        assert isinstance(event, CudaEvent), event
        self.torch.wait_event(event.torch)


class CudaAccelerator:
    """See `Accelerator`."""

    out_of_memory: tuple[type[BaseException], ...] = (torch.OutOfMemoryError,)
    max_graphs = 64

    def __init__(self, launcher: CudaDevice, device: torch.device) -> None:
        self._launcher = launcher
        self._device = device
        self._compute = CudaStream(launcher, device)
        self.compute = self._compute
        self.offload = CudaStream(launcher, device)
        self.restore = CudaStream(launcher, device)
        self._pool = torch.cuda.graph_pool_handle()

    def pinned(self, entries: int, dtype: torch.dtype) -> Tensor:
        """See `Accelerator`."""
        return torch.zeros(entries, dtype=dtype, pin_memory=True)

    def register(self, address: int, size_bytes: int) -> Tensor:
        """See `Accelerator`. All pages are taken at once."""
        driver = self._launcher.driver
        driver.register_host(address, size_bytes)
        tensor = torch.frombuffer((ctypes.c_uint8 * size_bytes).from_address(address), dtype=torch.uint8)
        # Not at the end of the process, when the driver may be gone: the kernel takes the pins back then.
        weakref.finalize(tensor, driver.unregister_host, address).atexit = False
        return tensor

    def calibrate_copies(self, block_bytes: int, max_ns: int) -> str:
        """See `Accelerator`. Half of the time is for each direction; loading the kernel is not part of it."""
        blocks = max(MIN_SCRATCH_BLOCKS, min(MAX_SCRATCH_BLOCKS, MAX_SCRATCH_BYTES // block_bytes))
        here = self.pinned(blocks * block_bytes, torch.uint8).view(blocks, block_bytes)
        there = torch.zeros(blocks, block_bytes, dtype=torch.uint8, device=self._device)
        # The zeros are another stream's work.
        torch.cuda.synchronize(self._device)
        found = []
        for stream, source, target in ((self.offload, there, here), (self.restore, here, there)):
            stream.copy_blocks(source, target, [(0, 0)])
            stream.record().wait()
            end = time.monotonic_ns() + max_ns // 2
            found.append(stream.calibrate(source, target, lambda end=end: time.monotonic_ns() < end))  # type: ignore[misc]  # mypy infers no lambda defaults
        return f"out: {found[0]}; back: {found[1]}"

    def capture(self, work: Work) -> Graph:
        """See `Accelerator`."""
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self._pool, stream=self._compute.torch):
                work()
        except self.out_of_memory:
            raise
        except RuntimeError as error:
            raise WorkerError(f"a step could not be captured as a CUDA graph: {error}") from error
        replay: Graph = graph.replay
        return replay

    def memory(self) -> MemoryFigures:
        """See `Accelerator`."""
        self.empty_cache()
        free, total = torch.cuda.mem_get_info(self._device)
        return MemoryFigures(int(free), int(total))

    def peak_bytes(self, work: Work) -> int:
        """See `Accelerator`."""
        self.empty_cache()
        before = torch.cuda.memory_allocated(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        self._compute.run(work)
        torch.cuda.synchronize(self._device)
        return int(torch.cuda.max_memory_allocated(self._device) - before)

    def empty_cache(self) -> None:
        """See `Accelerator`."""
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()

    def sampler(self, vocabulary: int, max_rows: int) -> DeviceSampler:
        """See `Accelerator`."""
        from llmscale.layers.triton.sampler.sampler import TritonSampler

        return TritonSampler(vocabulary, max_rows, self._device)
