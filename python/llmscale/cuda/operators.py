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
from llmscale.cuda.fragment_order import CHUNK
from llmscale.cuda.launch import Launcher
from llmscale.cuda.matmul import launch_matmul, launch_panel
from llmscale.cuda.matmul_plan import MAX_ROWS
from llmscale.cuda.matrices import E4m3Matrix, Int4Matrix, WeightMatrix

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
    matrix = Int4Matrix(weights, scales, zero_points, columns, x.shape[1], group)
    return _multiply(x, matrix, workspace)


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
    return (x.float() @ matrix.dequantized().T).to(x.dtype)


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
    matrix = E4m3Matrix(weights, group_scales, column_scales, columns, x.shape[1])
    return _multiply(x, matrix, workspace)


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
    return (x.float() @ matrix.dequantized().T).to(x.dtype)


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


def _multiply(x: Tensor, matrix: WeightMatrix, workspace: Tensor) -> Tensor:
    launcher = cuda_device(x.device.index)
    x = x.contiguous()
    y = x.new_empty(x.shape[0], matrix.columns)
    if 0 < x.shape[0] <= MAX_ROWS:
        launch_matmul(launcher, x, matrix, workspace, y)
    elif x.shape[0]:
        multiply_by_panels(launcher, x, matrix, y)
    return y


def multiply_by_panels(launcher: Launcher, x: Tensor, matrix: WeightMatrix, y: Tensor) -> None:
    """y = x W^T for many rows: W as bfloat16, some columns at a time, and a dense product of each."""
    width = max(CHUNK, MAX_PANEL_BYTES // (2 * matrix.depth) // CHUNK * CHUNK)
    panel = x.new_empty(min(width, matrix.columns), matrix.depth)
    for first in range(0, matrix.columns, width):
        part = panel[: matrix.columns - first]
        launch_panel(launcher, matrix, first, part)
        torch.mm(x, part.T, out=y[:, first : first + part.shape[0]])
