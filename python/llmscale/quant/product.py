"""What this machine's CPU and torch build offer for products with quantized weights.

Answers are constant for a process. It does not know methods.
"""

from __future__ import annotations

import torch


def has_vnni(device: torch.device) -> bool:
    """Whether oneDNN multiplies bytes exactly here: without VNNI pairs of products saturate at 16 bits."""
    if device.type != "cpu" or not torch._C._has_mkldnn:
        return False
    found = torch.cpu.get_capabilities()
    return bool(found.get("avx512_vnni") or found.get("avx_vnni"))
