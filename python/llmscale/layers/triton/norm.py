"""RMS norm, alone or behind the addition of a residual, one program per row.

A row is read once and kept in registers, so a kernel moves two rows per row, or four with a residual. The roundings are
those of `layers/norm.py`: the sum to the stream's dtype, the normalized row before the weight. It does not know what it
is that it normalizes.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from llmscale.layers.triton.launch import FUSED, padded, require_dense


@triton.jit
def rms_norm_kernel(x, residual, weight, out, epsilon, hidden: tl.constexpr, block: tl.constexpr):
    """Grid (T). `residual` [T, H] or None, which makes it a plain norm of `x`."""
    first = tl.program_id(0).to(tl.int64) * hidden
    element = tl.arange(0, block)
    inside = element < hidden
    wide = tl.load(x + first + element, mask=inside, other=0.0).to(tl.float32)
    if residual is not None:
        before = tl.load(residual + first + element, mask=inside, other=0.0).to(tl.float32)
        after = (before + wide).to(residual.dtype.element_ty)
        tl.store(residual + first + element, after, mask=inside)
        wide = after.to(tl.float32)
    variance = tl.sum(wide * wide, 0) / hidden
    normed = (wide * tl.rsqrt(variance + epsilon)).to(out.dtype.element_ty).to(tl.float32)
    factor = tl.load(weight + element, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + first + element, (factor * normed).to(out.dtype.element_ty), mask=inside)


def launch_rms_norm(x: Tensor, residual: Tensor | None, weight: Tensor, epsilon: float, out: Tensor) -> None:
    """`x`, `residual` and `out` [T, H], `weight` [H]; see `Ops.rms_norm` and `Ops.add_rms_norm`."""
    require_dense(x=x, weight=weight, out=out)
    if residual is not None:
        require_dense(residual=residual)
    rows, hidden = out.shape
    assert x.shape == out.shape, (x.shape, out.shape)
    assert weight.shape == (hidden,), (weight.shape, hidden)
    block = padded(hidden)
    rms_norm_kernel[(rows,)](x, residual, weight, out, epsilon, hidden, block, num_warps=warps_for(block), **FUSED)


def warps_for(block: int) -> int:
    """Warps that hold a row of `block` elements with at most 32 of them in a thread."""
    return max(1, min(16, block // 512))
