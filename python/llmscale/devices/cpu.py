"""The processor as a device: native kernels, oneDNN's products, nothing that runs apart.

Everything is done when a call returns, so there are no streams and no copies. It does not know steps or models.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmscale._core import CpuKernels
from llmscale.devices.interface import DenseProducts, OpsNeeds
from llmscale.layers.native import NativeOps
from llmscale.layers.ops import Ops
from llmscale.quant.dense import product_class
from llmscale.quant.layouts import Layout
from llmscale.quant.method import Product, method_for
from llmscale.quant.weight import QuantizedWeight


class CpuDevice:
    """See `Device`."""

    name = "cpu"
    accelerator = None

    def __init__(self) -> None:
        self.torch_device = torch.device("cpu")

    def numerics(self, kernels: CpuKernels) -> str:
        """See `Device`."""
        return f"cpu-{kernels.level}"

    def ops(self, needs: OpsNeeds) -> Ops:
        """See `Device`."""
        return NativeOps(needs.kernels)

    def dense(self, dtype: torch.dtype) -> DenseProducts:
        """See `Device`."""
        return product_class(self.torch_device, dtype)

    def product(self, layout: Layout, weight: QuantizedWeight, bias: Tensor | None, dtype: torch.dtype) -> Product:
        """See `Device`."""
        return method_for(layout).prepare(weight, bias, dtype)


def open_device(index: int) -> CpuDevice:
    """There is one; ranks share it."""
    return CpuDevice()
