"""What this machine's CPU and torch build offer for matrix products.

Answers are constant for a process. It does not know weights or methods.
"""

from __future__ import annotations

import torch

from llmscale.errors import UnsupportedModel


def tiles_supported(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether oneDNN's tiles for dense weights work for this device and dtype."""
    if device.type != "cpu" or not torch._C._has_mkldnn:
        return False
    return dtype == torch.float32 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def has_vnni() -> bool:
    """Whether oneDNN multiplies bytes exactly on this CPU: without VNNI pairs of products saturate at 16 bits."""
    found = torch.cpu.get_capabilities()
    return torch._C._has_mkldnn and bool(found.get("avx512_vnni") or found.get("avx_vnni"))


def require_cpu(device: torch.device, method: str) -> None:
    """Raises UnsupportedModel for a device that has no product of a method yet."""
    if device.type != "cpu":
        raise UnsupportedModel(
            f"{method} weights are on {device.type}, which has no product for them yet; serve them on a CPU, or the"
            " dense checkpoint here."
        )
