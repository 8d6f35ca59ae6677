"""A CUDA device: Triton's operations and sampler, CUDA kernels for quantized weights, torch for dense ones.

Streams, graphs and pinned memory are in `cuda_streams.py`. Opening it makes torch's primary context on the device of
this process; one process uses one device. It does not know steps or models.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmscale._core import CpuKernels
from llmscale.cuda.device import cuda_device
from llmscale.cuda.matmul import make_workspace
from llmscale.devices.cuda_products import cuda_product
from llmscale.devices.cuda_streams import CudaAccelerator
from llmscale.devices.interface import DenseProducts, OpsNeeds
from llmscale.layers.ops import Ops
from llmscale.quant.dense import PlainProduct
from llmscale.quant.layouts import Layout
from llmscale.quant.method import Product
from llmscale.quant.weight import QuantizedWeight

MAX_COLUMNS = 1 << 20
"""Of a weight; its arrival counts take 32 KiB of the workspace."""


class CudaDevice:
    """See `Device`."""

    name = "cuda"

    def __init__(self, index: int) -> None:
        """Raises NoCudaDevice and CudaError."""
        self._launcher = cuda_device(index)
        self.torch_device = torch.device("cuda", index)
        torch.cuda.set_device(self.torch_device)
        self.accelerator = CudaAccelerator(self._launcher, self.torch_device)
        # Products follow each other on the compute stream, so one workspace serves all.
        self._workspace = make_workspace(MAX_COLUMNS, self._launcher.limits, self.torch_device)

    def numerics(self, kernels: CpuKernels) -> str:
        """See `Device`."""
        import triton

        major, minor = self._launcher.limits.compute_capability
        return f"cuda-sm{major}{minor}-triton-{triton.__version__}"

    def ops(self, needs: OpsNeeds) -> Ops:
        """See `Device`."""
        from llmscale.layers.triton.ops import OpsLimits, TritonOps

        limits = OpsLimits(needs.max_sequences, needs.max_sequence_tokens)
        return TritonOps(needs.attention, needs.dtype, limits, self.torch_device)

    def dense(self, dtype: torch.dtype) -> DenseProducts:
        """See `Device`."""
        return PlainProduct

    def product(self, layout: Layout, weight: QuantizedWeight, bias: Tensor | None, dtype: torch.dtype) -> Product:
        """See `Device`."""
        return cuda_product(layout, weight, bias, dtype, self._workspace)


def open_device(index: int) -> CudaDevice:
    """Device `index` as torch counts them. Raises NoCudaDevice and CudaError."""
    return CudaDevice(index)
