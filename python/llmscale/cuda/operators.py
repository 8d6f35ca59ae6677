"""The weight matmuls as torch operators: `llmscale::w4a16_matmul` and `llmscale::w8a16_matmul`.

Each has a CUDA implementation (kernels), a CPU one in plain torch from the same packed weights (the oracle, and what
makes a model file one for both devices) and a shape for tracing. Importing this module registers them. To 64 rows W is
read as it is, bound by its bytes; above, weights become bfloat16 panels of at most 32 MiB, which stay in L2, for
cuBLAS, bound by arithmetic. A workspace serves one stream.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmscale.cuda.device import cuda_device
from llmscale.cuda.fragment_order import CHUNK, unpack_e4m3, unpack_groups, unpack_int4
from llmscale.cuda.launch import Launcher
from llmscale.cuda.matmul import E4m3Matrix, Int4Matrix, launch_e4m3, launch_int4, launch_panel
from llmscale.cuda.matmul_plan import MAX_ROWS

MAX_PANEL_BYTES = 32 << 20


@torch.library.custom_op("llmscale::w4a16_matmul", mutates_args=("workspace",), device_types="cuda")
def w4a16_matmul(
    x: Tensor,
    weights: Tensor,
    scales: Tensor,
    zero_points: Tensor | None,
    workspace: Tensor,
    columns: int,
    group: int,
) -> Tensor:
    """bfloat16 x `[rows, depth]` times W^T: bfloat16 `[rows, columns]`.

    `weights` is of `pack_int4`, `scales` (bfloat16) and `zero_points` (uint8) are of `pack_groups` with groups of
    `group`, `workspace` is of `make_workspace` for this stream.
    """
    launcher = cuda_device(x.device.index)
    x = x.contiguous()
    matrix = Int4Matrix(weights, scales, zero_points, columns, x.shape[1], group)
    y = x.new_empty(x.shape[0], columns)
    if 0 < x.shape[0] <= MAX_ROWS:
        launch_int4(launcher, x, matrix, workspace, y)
    elif x.shape[0]:
        multiply_by_panels(launcher, x, matrix, y)
    return y


@w4a16_matmul.register_kernel("cpu")
def _w4a16_on_cpu(
    x: Tensor,
    weights: Tensor,
    scales: Tensor,
    zero_points: Tensor | None,
    workspace: Tensor,
    columns: int,
    group: int,
) -> Tensor:
    matrix = Int4Matrix(weights, scales, zero_points, columns, x.shape[1], group)
    return (x.float() @ dequantized_int4(matrix).T).to(x.dtype)


@w4a16_matmul.register_fake
def _w4a16_shape(
    x: Tensor,
    weights: Tensor,
    scales: Tensor,
    zero_points: Tensor | None,
    workspace: Tensor,
    columns: int,
    group: int,
) -> Tensor:
    return x.new_empty(x.shape[0], columns)


@torch.library.custom_op("llmscale::w8a16_matmul", mutates_args=("workspace",), device_types="cuda")
def w8a16_matmul(
    x: Tensor,
    weights: Tensor,
    group_scales: Tensor | None,
    column_scales: Tensor | None,
    workspace: Tensor,
    columns: int,
) -> Tensor:
    """The same with e4m3 weights of `pack_e4m3`: bfloat16 scales per 128 of depth, float32 scales per padded column."""
    launcher = cuda_device(x.device.index)
    x = x.contiguous()
    matrix = E4m3Matrix(weights, group_scales, column_scales, columns, x.shape[1])
    y = x.new_empty(x.shape[0], columns)
    if 0 < x.shape[0] <= MAX_ROWS:
        launch_e4m3(launcher, x, matrix, workspace, y)
    elif x.shape[0]:
        multiply_by_panels(launcher, x, matrix, y)
    return y


@w8a16_matmul.register_kernel("cpu")
def _w8a16_on_cpu(
    x: Tensor,
    weights: Tensor,
    group_scales: Tensor | None,
    column_scales: Tensor | None,
    workspace: Tensor,
    columns: int,
) -> Tensor:
    matrix = E4m3Matrix(weights, group_scales, column_scales, columns, x.shape[1])
    return (x.float() @ dequantized_e4m3(matrix).T).to(x.dtype)


@w8a16_matmul.register_fake
def _w8a16_shape(
    x: Tensor,
    weights: Tensor,
    group_scales: Tensor | None,
    column_scales: Tensor | None,
    workspace: Tensor,
    columns: int,
) -> Tensor:
    return x.new_empty(x.shape[0], columns)


def multiply_by_panels(launcher: Launcher, x: Tensor, matrix: Int4Matrix | E4m3Matrix, y: Tensor) -> None:
    """y = x W^T for many rows: W as bfloat16, some columns at a time, and a dense product of each."""
    width = max(CHUNK, MAX_PANEL_BYTES // (2 * matrix.depth) // CHUNK * CHUNK)
    panel = x.new_empty(min(width, matrix.columns), matrix.depth)
    for first in range(0, matrix.columns, width):
        part = panel[: matrix.columns - first]
        launch_panel(launcher, matrix, first, part)
        torch.mm(x, part.T, out=y[:, first : first + part.shape[0]])


def dequantized_int4(matrix: Int4Matrix) -> Tensor:
    """float32 `[columns, depth]`: (value - zero) * scale, exactly."""
    values = unpack_int4(matrix.weights, matrix.columns, matrix.depth).float()
    scales = unpack_groups(matrix.scales, matrix.columns, matrix.depth, matrix.group).float()
    zeros = torch.full_like(scales, 8.0)
    if matrix.zero_points is not None:
        zeros = unpack_groups(matrix.zero_points, matrix.columns, matrix.depth, matrix.group).float()
    wide = torch.stack((scales, zeros)).repeat_interleave(matrix.group, dim=2)[:, :, : matrix.depth]
    return (values - wide[1]) * wide[0]


def dequantized_e4m3(matrix: E4m3Matrix) -> Tensor:
    """float32 `[columns, depth]`, with both scales."""
    values = unpack_e4m3(matrix.weights, matrix.columns, matrix.depth).float()
    if matrix.group_scales is not None:
        scales = unpack_groups(matrix.group_scales, matrix.columns, matrix.depth, 128).float()
        values *= scales.repeat_interleave(128, dim=1)[:, : matrix.depth]
    if matrix.column_scales is not None:
        values *= matrix.column_scales[: matrix.columns, None]
    return values
