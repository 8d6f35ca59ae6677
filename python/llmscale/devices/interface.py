"""What a device is to a worker. Another accelerator is one file that provides this, and one line in `registry.py`.

It has to provide: a torch device that holds weights, KV region and activations; `Ops`, the products of quantized
weights and a name for how they round (`numerics`). If it computes apart from the processor it also has an
`Accelerator`: streams that do work in order, events between them, memory that it copies from by itself, graphs that
repeat recorded work, a sampler, and figures of its memory. A processor has none, and its worker pays for none.
Work is handed to a stream as a function of no result: it may run at once, or start kernels, or run later. So nobody
may look at what it wrote, nor change what it reads, before an event behind it is done. Constant cost per call. It does
not know steps, sequences or models beyond their shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from llmscale._core import CpuKernels
from llmscale.layers.ops import Ops
from llmscale.layers.triton.sampler.rows import SamplingRows
from llmscale.models.spec import AttentionSpec
from llmscale.quant.layouts import Layout
from llmscale.quant.method import Product
from llmscale.quant.weight import QuantizedWeight

Work = Callable[[], object]
"""What a stream is to do; its result is not used."""


@dataclass(frozen=True, slots=True)
class OpsNeeds:
    """What operations are made for."""

    attention: AttentionSpec
    dtype: torch.dtype
    max_sequences: int
    max_sequence_tokens: int
    kernels: CpuKernels
    """Of this process, for devices that compute with them."""


@dataclass(frozen=True, slots=True)
class MemoryFigures:
    """Bytes of a device's memory that nobody has taken, and all of them."""

    free_bytes: int
    total_bytes: int


class Event(Protocol):
    """A point in a stream."""

    def wait(self) -> None:
        """Blocks until all that was in the stream before is done. Raises what went wrong there."""

    @property
    def is_done(self) -> bool: ...

    def elapsed_ns_since(self, earlier: Event) -> int:
        """Time of the device between two events that are done."""


class Stream(Protocol):
    """Work in order. Streams know nothing of each other but what `wait_for` says."""

    def run(self, work: Work) -> None:
        """Does work behind what is there. What it reads and writes must stay. Raises `out_of_memory` errors at once."""

    def copy(self, source: Tensor, target: Tensor) -> None:
        """Copies contiguous memory of one shape and dtype between device and pinned memory."""

    def copy_blocks(self, source: Tensor, target: Tensor, pairs: Sequence[tuple[int, int]]) -> None:
        """Copies rows `pairs[i][0]` of uint8 `source` [n, bytes] to rows `pairs[i][1]` of `target` [m, bytes].

        Each row is contiguous; rows may have gaps between them. No row is written twice.
        """

    def record(self) -> Event:
        """An event behind what is there."""

    def wait_for(self, event: Event) -> None:
        """What comes behind starts after the event. Blocks nobody."""


class Graph(Protocol):
    """Recorded work that reads and writes the memory it was recorded with, as a stream's `Work`."""

    def __call__(self) -> None: ...


class DeviceSampler(Protocol):
    """Samples rows of logits on the device, token for token what the processor's sampler picks."""

    @property
    def max_rows(self) -> int:
        """Rows that `drawn` has room for; it may be more than was asked for."""

    @property
    def drawn(self) -> Tensor:
        """int32 on the device, laid out as `llmscale_engine::columns` reads it."""

    def sample(self, logits: Tensor, rows: SamplingRows) -> object:
        """Fills `drawn` for each row of `logits`. To be called as work of a stream; it may be captured."""

    def hand_on(self, drawn_from: Tensor, token_ids: Tensor) -> object:
        """Puts ids that were drawn last in the place of those that nobody knew when a step was packed.

        `drawn_from` int32 [S]: 0, or one more than the row of `drawn` whose id is that of row s; `token_ids` int32 [T],
        T >= S where it is not 0. A row without an id has 0, which is one. To be called as work of a stream; it may be
        captured.
        """


class Accelerator(Protocol):
    """A device that computes apart from the processor."""

    @property
    def compute(self) -> Stream:
        """Steps run here."""

    @property
    def offload(self) -> Stream:
        """Blocks leave here."""

    @property
    def restore(self) -> Stream:
        """Blocks come back here."""

    @property
    def out_of_memory(self) -> tuple[type[BaseException], ...]:
        """Raised by work that found no memory; what was in the stream before goes on."""

    @property
    def max_graphs(self) -> int:
        """0 for a device that captures none."""

    def pinned(self, entries: int, dtype: torch.dtype) -> Tensor:
        """New memory of the host that streams copy from and to by themselves, zeroed."""

    def register(self, address: int, size_bytes: int) -> Tensor:
        """Pins memory that somebody else owns and keeps as long as this object lives: uint8 [size_bytes]."""

    def calibrate_copies(self, block_bytes: int, max_ns: int) -> str:
        """Measures how `offload` and `restore` best copy blocks of this size without gaps, in scratch memory, once and
        in about `max_ns` at most. Says what was found, for a log."""

    def capture(self, work: Work) -> Graph:
        """Records work of the compute stream without doing it; all graphs share one pool. Whoever calls has done the
        same work before, so that kernels are loaded. Raises WorkerError for work that reads something back."""

    def memory(self) -> MemoryFigures:
        """After giving back what the allocator keeps for later."""

    def peak_bytes(self, work: Work) -> int:
        """Does work to its end, and says how much memory it needed beyond what was there before."""

    def empty_cache(self) -> None:
        """Waits for all work of the device, and gives back what the allocator keeps for later."""

    def sampler(self, vocabulary: int, max_rows: int) -> DeviceSampler: ...


class DenseProducts(Protocol):
    """Makes products of weights that are not quantized."""

    @property
    def kind(self) -> str:
        """How they are computed, for the numerics id."""

    def __call__(self, weight: Tensor, bias: Tensor | None) -> Product:
        """Of a weight [N, K] on the device and a bias [N] in its dtype."""


class Device(Protocol):
    """One device of this process."""

    @property
    def name(self) -> str: ...
    @property
    def torch_device(self) -> torch.device: ...
    @property
    def accelerator(self) -> Accelerator | None:
        """None for the processor."""

    def numerics(self, kernels: CpuKernels) -> str:
        """Kernels and their level, as part of what tokens depend on."""

    def ops(self, needs: OpsNeeds) -> Ops: ...

    def dense(self, dtype: torch.dtype) -> DenseProducts:
        """For weights and activations of a dtype."""

    def product(self, layout: Layout, weight: QuantizedWeight, bias: Tensor | None, dtype: torch.dtype) -> Product:
        """A quantized weight on the device, laid out to be multiplied. Raises UnsupportedModel."""
