"""Launches of the weight matmuls: y = x W^T with W of 4 or 8 bits in fragment order, and W as a bfloat16 panel.

Makes launches from tensors; checks that shapes fit together (invariants of ours: weights come from `fragment_order`).
A workspace belongs to one stream: launches of one stream follow each other, those of two would share partial sums.
O(1) per launch. Does not know devices.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from llmscale.cuda.fragment_order import CHUNK, PADDED_COLUMNS, depth_chunks, group_count, padded_columns
from llmscale.cuda.launch import Argument, DeviceLimits, Launch, Launcher, int32s
from llmscale.cuda.matmul_plan import (
    THREADS,
    MatmulPlan,
    MatmulShape,
    WeightFormat,
    max_columns_of,
    partial_sum_bytes,
    plan_matmul,
    workspace_bytes,
)

PANEL_SHARED_BYTES = 8 * 16 * (CHUNK + 8) * 2
PANEL_THREADS = 256


@dataclass(frozen=True, slots=True)
class Int4Matrix:
    """W4A16: weights of `pack_int4`, bfloat16 scales and uint8 zero points (None: 8) of `pack_groups`."""

    weights: Tensor
    scales: Tensor
    zero_points: Tensor | None
    columns: int
    depth: int
    group: int

    def __post_init__(self) -> None:
        chunks = (padded_columns(self.columns) // CHUNK, depth_chunks(self.depth))
        groups = (group_count(self.depth, self.group), padded_columns(self.columns))
        assert self.weights.shape == (*chunks, 4, 32, 4), (self.weights.shape, chunks)
        assert self.weights.dtype == torch.int32, self.weights.dtype
        assert self.scales.shape == groups, (self.scales.shape, groups)
        assert self.scales.dtype == torch.bfloat16, self.scales.dtype
        assert self.zero_points is None or self.zero_points.shape == groups, (self.zero_points, groups)
        assert self.zero_points is None or self.zero_points.dtype == torch.uint8, self.zero_points.dtype


@dataclass(frozen=True, slots=True)
class E4m3Matrix:
    """Weights of `pack_e4m3` with bfloat16 scales per group of 128 (`pack_groups`), float32 scales per column, or both.

    Column scales are `[padded columns]` in their natural order.
    """

    weights: Tensor
    group_scales: Tensor | None
    column_scales: Tensor | None
    columns: int
    depth: int

    def __post_init__(self) -> None:
        chunks = (padded_columns(self.columns) // CHUNK, depth_chunks(self.depth))
        groups = (group_count(self.depth, 128), padded_columns(self.columns))
        assert self.weights.shape == (*chunks, 4, 2, 32, 4), (self.weights.shape, chunks)
        assert self.weights.dtype == torch.int32, self.weights.dtype
        assert self.group_scales is None or self.group_scales.shape == groups, (self.group_scales, groups)
        assert self.group_scales is None or self.group_scales.dtype == torch.bfloat16, self.group_scales.dtype
        assert self.column_scales is None or self.column_scales.shape == groups[1:], (self.column_scales, groups)
        assert self.column_scales is None or self.column_scales.dtype == torch.float32, self.column_scales.dtype


def make_workspace(max_columns: int, limits: DeviceLimits, device: torch.device) -> Tensor:
    """Partial sums and arrival counts of one stream, uint8. Counts are zero before the first launch and after each."""
    return torch.zeros(workspace_bytes(max_columns, limits), dtype=torch.uint8, device=device)


def launch_int4(launcher: Launcher, x: Tensor, matrix: Int4Matrix, workspace: Tensor, y: Tensor) -> None:
    """bfloat16 x `[rows, depth]`, y `[rows, columns]`, both contiguous, at most 64 rows."""
    shape = MatmulShape(WeightFormat.INT4, x.shape[0], matrix.columns, matrix.depth, matrix.group)
    plan = plan_matmul(shape, launcher.limits)
    group_shift = ctypes.c_int32(matrix.group.bit_length() - 1)
    parts = _workspace_parts(workspace, shape, launcher.limits)
    for rows in _row_ranges(x, y, shape, plan):
        weights = (matrix.weights, matrix.scales, matrix.zero_points)
        sizes = int32s(y[rows].shape[0], matrix.columns, matrix.depth)
        arguments: tuple[Argument, ...] = (x[rows], *weights, y[rows], *parts, *sizes, group_shift)
        launcher.launch(Launch(plan.kernel, (plan.blocks, 1, 1), THREADS, plan.shared_bytes, arguments))


def launch_e4m3(launcher: Launcher, x: Tensor, matrix: E4m3Matrix, workspace: Tensor, y: Tensor) -> None:
    """The same for weights of 8 bits."""
    shape = MatmulShape(WeightFormat.E4M3, x.shape[0], matrix.columns, matrix.depth, 128)
    plan = plan_matmul(shape, launcher.limits)
    parts = _workspace_parts(workspace, shape, launcher.limits)
    for rows in _row_ranges(x, y, shape, plan):
        weights = (matrix.weights, matrix.group_scales, matrix.column_scales)
        sizes = int32s(y[rows].shape[0], matrix.columns, matrix.depth)
        arguments: tuple[Argument, ...] = (x[rows], *weights, y[rows], *parts, *sizes)
        launcher.launch(Launch(plan.kernel, (plan.blocks, 1, 1), THREADS, plan.shared_bytes, arguments))


def launch_panel(launcher: Launcher, matrix: Int4Matrix | E4m3Matrix, first_column: int, panel: Tensor) -> None:
    """Columns `first_column` (a multiple of 64) and following of W as bfloat16 `[columns, depth]`, contiguous."""
    columns, depth = panel.shape
    assert panel.dtype == torch.bfloat16, panel.dtype
    assert panel.is_contiguous()
    assert depth == matrix.depth, (depth, matrix.depth)
    assert depth % 8 == 0, depth
    assert first_column % CHUNK == 0, first_column
    assert first_column + columns <= matrix.columns, (first_column, columns, matrix.columns)
    sizes = int32s(first_column, columns, depth, padded_columns(matrix.columns))
    arguments: tuple[Argument, ...]
    if isinstance(matrix, Int4Matrix):
        kernel, scales = "w4_panel", (matrix.scales, matrix.zero_points)
        arguments = (matrix.weights, *scales, panel, *sizes, *int32s(matrix.group.bit_length() - 1))
    else:
        kernel = "w8_panel"
        arguments = (matrix.weights, matrix.group_scales, matrix.column_scales, panel, *sizes)
    grid = (-(-depth_chunks(depth) // 2), -(-columns // CHUNK), 1)
    launcher.launch(Launch(kernel, grid, PANEL_THREADS, PANEL_SHARED_BYTES, arguments))


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
