"""Launches of the weight matmuls: y = x W^T with W of 4 or 8 bits in fragment order, and W as a bfloat16 panel.

Makes launches from tensors and checks that rows fit the matrix; what differs between formats is `matrices`' affair.
A workspace belongs to one stream: launches of one stream follow each other, those of two would share partial sums.
O(1) per launch. Does not know devices.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmscale.cuda.fragment_order import CHUNK, PADDED_COLUMNS, depth_chunks, padded_columns
from llmscale.cuda.launch import Argument, DeviceLimits, Launch, Launcher, int32s
from llmscale.cuda.matmul_plan import (
    THREADS,
    MatmulPlan,
    MatmulShape,
    max_columns_of,
    partial_sum_bytes,
    plan_matmul,
    workspace_bytes,
)
from llmscale.cuda.matrices import WeightMatrix

PANEL_SHARED_BYTES = 8 * 16 * (CHUNK + 8) * 2
PANEL_THREADS = 256


def make_workspace(max_columns: int, limits: DeviceLimits, device: torch.device) -> Tensor:
    """Partial sums and arrival counts of one stream, uint8. Counts are zero before the first launch and after each."""
    return torch.zeros(workspace_bytes(max_columns, limits), dtype=torch.uint8, device=device)


def launch_matmul(launcher: Launcher, x: Tensor, matrix: WeightMatrix, workspace: Tensor, y: Tensor) -> None:
    """bfloat16 x `[rows, depth]`, y `[rows, columns]`, both contiguous, at most 64 rows."""
    shape = MatmulShape(matrix.format, x.shape[0], matrix.columns, matrix.depth, matrix.group)
    plan = plan_matmul(shape, launcher.limits)
    parts = _workspace_parts(workspace, shape, launcher.limits)
    for rows in _row_ranges(x, y, shape, plan):
        sizes = int32s(y[rows].shape[0], matrix.columns, matrix.depth)
        arguments: tuple[Argument, ...] = (x[rows], *matrix.operands, y[rows], *parts, *sizes, *matrix.parameters)
        launcher.launch(Launch(plan.kernel, (plan.blocks, 1, 1), THREADS, plan.shared_bytes, arguments))


def launch_panel(launcher: Launcher, matrix: WeightMatrix, first_column: int, panel: Tensor) -> None:
    """Columns `first_column` (a multiple of 64) and following of W as bfloat16 `[columns, depth]`, contiguous."""
    columns, depth = panel.shape
    assert panel.dtype == torch.bfloat16, panel.dtype
    assert panel.is_contiguous()
    assert depth == matrix.depth, (depth, matrix.depth)
    assert depth % 8 == 0, depth
    assert first_column % CHUNK == 0, first_column
    assert first_column + columns <= matrix.columns, (first_column, columns, matrix.columns)
    sizes = int32s(first_column, columns, depth, padded_columns(matrix.columns))
    arguments: tuple[Argument, ...] = (*matrix.operands, panel, *sizes, *matrix.parameters)
    grid = (-(-depth_chunks(depth) // 2), -(-columns // CHUNK), 1)
    launcher.launch(Launch(matrix.panel_kernel, grid, PANEL_THREADS, PANEL_SHARED_BYTES, arguments))


def _row_ranges(x: Tensor, y: Tensor, shape: MatmulShape, plan: MatmulPlan) -> list[slice]:
    assert x.dtype == y.dtype == torch.bfloat16, (x.dtype, y.dtype)
    assert x.is_contiguous(), x.stride()
    assert y.is_contiguous(), y.stride()
    assert x.shape == (shape.rows, shape.depth), (x.shape, shape)
    assert y.shape == (shape.rows, shape.columns), (y.shape, shape)
    assert x.data_ptr() % 16 == 0, "rows are copied in pieces of 16 bytes"
    return [slice(first, first + plan.rows) for first in range(0, shape.rows, plan.rows)]


def _workspace_parts(workspace: Tensor, shape: MatmulShape, limits: DeviceLimits) -> tuple[Tensor, Tensor]:
    widest = max_columns_of(workspace.numel(), limits)
    assert shape.columns <= widest, f"a workspace for {widest} columns, a matrix of {shape.columns}"
    sums = partial_sum_bytes(limits)
    counts = sums + padded_columns(shape.columns) // PADDED_COLUMNS * 4
    return workspace[:sums], workspace[sums:counts]
