"""What every launch of a kernel has in common: powers of two, memory without gaps, whether Triton's interpreter runs.

A grid's size follows from shapes and capacities alone, never from a value on the device, so a launch reads nothing back
and can be captured in a CUDA graph. It costs no device time. It does not know any kernel.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

FUSED = {"enable_fp_fusion": True}
"""Option of a launch whose multiplications and additions may be fused."""
EXACT = {"enable_fp_fusion": False}
"""Option of a launch whose results must have the CPU's bits: a fused multiply-add rounds once instead of twice."""


def padded(elements: int) -> int:
    """The next power of two: the only extents that a block of Triton has."""
    assert elements > 0, elements
    return 1 << (elements - 1).bit_length()


def blocks_of(elements: int, block: int) -> int:
    """How many blocks cover `elements`."""
    return -(-elements // block)


def require_dense(**tensors: Tensor) -> None:
    """A tensor with gaps would be read past its end, so it is refused here."""
    for name, tensor in tensors.items():
        assert tensor.is_contiguous(), f"{name} needs contiguous memory, not strides {tensor.stride()}"


def interpreted() -> bool:
    """Whether kernels run on the CPU, one program after the other (`TRITON_INTERPRET=1` before the first import)."""
    return bool(triton.knobs.runtime.interpret)


def products_in_float32(dtype: torch.dtype) -> bool:
    """Whether matrix products widen their operands first.

    The interpreter holds bfloat16 as 16-bit integers and multiplies those, with errors of 1e9 and no message; on a
    device the tensor cores take bfloat16 as it is. float32 is multiplied in float32 everywhere.
    """
    return dtype == torch.bfloat16 and interpreted()
