"""The fake device as `Device` and `Accelerator`: `registry.DEVICES["cpu"] = "tests.fakes.fake_device.device"`."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import torch
from torch import Tensor

from llmscale._core import CpuKernels
from llmscale.devices.cuda_products import cuda_product
from llmscale.devices.interface import DenseProducts, DeviceSampler, MemoryFigures, OpsNeeds
from llmscale.layers.ops import Ops
from llmscale.quant.dense import PlainProduct
from llmscale.quant.layouts import Layout
from llmscale.quant.method import Product
from llmscale.quant.weight import QuantizedWeight
from tests.fakes.fake_device.graphs import FakeGraph
from tests.fakes.fake_device.machine import SCRIPT, FakeOutOfMemory, FakeStream, Machine, Script
from tests.fakes.fake_device.operations import FakeOps, FakeSampler


class FakeAccelerator:
    """See `Accelerator`."""

    out_of_memory: tuple[type[BaseException], ...] = (FakeOutOfMemory,)

    def __init__(self, script: Script) -> None:
        self.script = script
        self.machine = Machine(script)
        self.max_graphs = script.max_graphs
        self.compute = FakeStream(self.machine, computes=True)
        self.offload = FakeStream(self.machine)
        self.restore = FakeStream(self.machine)
        self.kernels: CpuKernels | None = None
        self._kept: list[object] = []

    def pinned(self, entries: int, dtype: torch.dtype) -> Tensor:
        memory = torch.zeros(entries, dtype=dtype)
        self._kept.append(memory)
        self.machine.pin(memory.data_ptr(), memory.nbytes)
        return memory

    def register(self, address: int, size_bytes: int) -> Tensor:
        self.machine.pin(address, size_bytes)
        return torch.frombuffer((ctypes.c_uint8 * size_bytes).from_address(address), dtype=torch.uint8)

    def calibrate_copies(self, block_bytes: int, max_ns: int) -> str:
        here = self.pinned(2 * block_bytes, torch.uint8).view(2, block_bytes)
        there = torch.zeros(2, block_bytes, dtype=torch.uint8)
        for stream, source, target in ((self.offload, there, here), (self.restore, here, there)):
            stream.copy_blocks(source, target, [(0, 1), (1, 0)])
            stream.record().wait()
        self.script.calibrated.append((block_bytes, max_ns))
        return "fake"

    def capture(self, work: Callable[[], object]) -> Callable[[], None]:
        self.machine.drain()
        return FakeGraph(self.machine, work)

    def memory(self) -> MemoryFigures:
        return MemoryFigures(self.script.free_bytes, self.script.total_bytes)

    def peak_bytes(self, work: Callable[[], object]) -> int:
        self.compute.run(work)
        self.machine.drain()
        return self.script.step_bytes

    def empty_cache(self) -> None:
        self.script.empties += 1
        self.machine.drain()

    def sampler(self, vocabulary: int, max_rows: int) -> DeviceSampler:
        if self.script.triton:
            from llmscale.layers.triton.sampler.sampler import TritonSampler

            return TritonSampler(vocabulary, max_rows, torch.device("cpu"))
        assert self.kernels is not None, "operations come first"
        return FakeSampler(self.machine, self.kernels, vocabulary, max_rows)


class FakeDevice:
    """See `Device`."""

    name = "fake"

    def __init__(self, script: Script) -> None:
        self.torch_device = torch.device("cpu")
        self.accelerator = FakeAccelerator(script)

    def numerics(self, kernels: CpuKernels) -> str:
        return f"fake-{kernels.level}"

    def ops(self, needs: OpsNeeds) -> Ops:
        if self.accelerator.script.triton:
            from llmscale.layers.triton.ops import OpsLimits, TritonOps

            limits = OpsLimits(needs.max_sequences, needs.max_sequence_tokens)
            return TritonOps(needs.attention, needs.dtype, limits, self.torch_device)
        self.accelerator.kernels = needs.kernels
        return FakeOps(self.accelerator.machine, needs.kernels)

    def dense(self, dtype: torch.dtype) -> DenseProducts:
        return PlainProduct

    def product(self, layout: Layout, weight: QuantizedWeight, bias: Tensor | None, dtype: torch.dtype) -> Product:
        return cuda_product(layout, weight, bias, dtype, torch.zeros(0, dtype=torch.uint8))


def open_device(index: int) -> FakeDevice:
    return FakeDevice(SCRIPT)
