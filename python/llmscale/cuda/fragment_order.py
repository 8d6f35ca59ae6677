"""Weights in the order in which tensor cores want them, so that a lane's 16 bytes are its operand.

`cuda/README.md` states the layout; the kernels read it through `cuda/include/llmscale/weights.cuh`. Packing is a
permutation of bytes in torch, O(weights), at load time; unpacking is its inverse and serves the CPU implementations of
the operators. Padding is never visible in a product. Does not know how weights were quantized.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

CHUNK = 64
"""Columns and depth of a chunk; packed depth is a multiple of it."""
PADDED_COLUMNS = 128
"""Packed columns are a multiple of what one thread block computes."""
GROUPS = (32, 64, 128)
"""Legal group sizes, in elements of depth."""


def padded_columns(columns: int) -> int:
    """Columns of the packed matrix."""
    return -(-columns // PADDED_COLUMNS) * PADDED_COLUMNS


def depth_chunks(depth: int) -> int:
    """Chunks along the depth."""
    return -(-depth // CHUNK)


def group_count(depth: int, group: int) -> int:
    """Groups of the packed matrix, those of padding included."""
    return -(-depth_chunks(depth) * CHUNK // group)


def pack_int4(values: Tensor) -> Tensor:
    """uint8 `[columns, depth]` of 0..15 to int32 `[padded columns / 64, padded depth / 64, 4, 32, 4]`."""
    assert values.dtype == torch.uint8, values.dtype
    assert values.ndim == 2, values.shape
    # Axes of a matrix: chunk, tile, half (8 columns), g; chunk, k16, k8, t, pair.
    parts = _padded(values).view(-1, 4, 2, 8, depth_chunks(values.shape[1]), 4, 2, 4, 2)
    order = parts.permute(0, 4, 1, 3, 7, 5, 8, 6, 2)  # ..., g, t, k16, pair, k8, half
    joined = order[..., 0] | order[..., 1] << 4
    return joined.contiguous().view(-1).view(torch.int32).view(*joined.shape[:3], 32, 4)


def unpack_int4(packed: Tensor, columns: int, depth: int) -> Tensor:
    """The inverse of `pack_int4`: uint8 `[columns, depth]`."""
    chunks = packed.shape[:2]
    joined = packed.contiguous().view(-1).view(torch.uint8).view(*chunks, 4, 8, 4, 4, 2, 2)
    order = torch.stack((joined & 15, joined >> 4), dim=-1)
    parts = order.permute(0, 2, 8, 3, 1, 5, 7, 4, 6)
    return parts.reshape(chunks[0] * CHUNK, chunks[1] * CHUNK)[:columns, :depth].contiguous()


def pack_e4m3(values: Tensor) -> Tensor:
    """float8_e4m3fn `[columns, depth]` without NaN to int32 `[padded columns / 64, padded depth / 64, 4, 2, 32, 4]`."""
    assert values.dtype == torch.float8_e4m3fn, values.dtype
    assert values.ndim == 2, values.shape
    parts = _padded(values.view(torch.uint8)).view(-1, 4, 2, 8, depth_chunks(values.shape[1]), 2, 2, 2, 4, 2)
    # ..., k32, g, t, k16, k8, pair, half; of a 16-bit unit the second half of the columns is the lower byte.
    order = parts.permute(0, 4, 1, 5, 3, 8, 6, 7, 9, 2).flip(-1)
    return order.contiguous().view(-1).view(torch.int32).view(*order.shape[:4], 32, 4)


def unpack_e4m3(packed: Tensor, columns: int, depth: int) -> Tensor:
    """The inverse of `pack_e4m3`."""
    chunks = packed.shape[:2]
    order = packed.contiguous().view(-1).view(torch.uint8).view(*chunks, 4, 2, 8, 4, 2, 2, 2, 2).flip(-1)
    parts = order.permute(0, 2, 9, 4, 1, 3, 6, 7, 5, 8)
    values = parts.reshape(chunks[0] * CHUNK, chunks[1] * CHUNK)[:columns, :depth].contiguous()
    return values.view(torch.float8_e4m3fn)


def pack_groups(values: Tensor, depth: int, group: int) -> Tensor:
    """Scales or zero points `[columns, groups]` to `[padded groups, padded columns]`, permuted within 64 columns.

    A lane's values for the four tiles of a chunk are then neighbours: column `16 tile + 8 half + g` is at
    `8 g + 2 tile + half`. Padding is zeros.
    """
    assert group in GROUPS, group
    columns, groups = values.shape
    assert groups == -(-depth // group), (groups, depth, group)
    padded = functional.pad(values, (0, group_count(depth, group) - groups, 0, padded_columns(columns) - columns))
    parts = padded.view(-1, 4, 2, 8, padded.shape[1])
    return parts.permute(4, 0, 3, 1, 2).reshape(padded.shape[1], padded.shape[0]).contiguous()


def unpack_groups(packed: Tensor, columns: int, depth: int, group: int) -> Tensor:
    """The inverse of `pack_groups`: `[columns, groups]`."""
    parts = packed.view(packed.shape[0], -1, 8, 4, 2)
    values = parts.permute(1, 3, 4, 2, 0).reshape(packed.shape[1], packed.shape[0])
    return values[:columns, : -(-depth // group)].contiguous()


def _padded(values: Tensor) -> Tensor:
    columns, depth = values.shape
    return functional.pad(values, (0, depth_chunks(depth) * CHUNK - depth, 0, padded_columns(columns) - columns))
