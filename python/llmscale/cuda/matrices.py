"""Packed weight matrices: the tensors of one matrix with what its kernels are told besides, and what it stands for.

One class per format; whoever launches or multiplies asks nothing else of a format. Checks that shapes fit together
(invariants of ours: weights come from `fragment_order`). `dequantized` is linear in the matrix, for tests and CPUs; the
rest is O(1). Does not know launches or devices.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from llmscale.cuda.fragment_order import (
    CHUNK,
    depth_chunks,
    group_count,
    padded_columns,
    unpack_e4m3,
    unpack_groups,
    unpack_int4,
)
from llmscale.cuda.launch import Argument
from llmscale.cuda.matmul_plan import WeightFormat

E4M3_GROUP = 128


class WeightMatrix(Protocol):
    """W of `columns` outputs (rows of W) and `depth` inputs, in some format."""

    @property
    def format(self) -> WeightFormat:
        """Which kernels read it."""

    @property
    def columns(self) -> int:
        """Outputs."""

    @property
    def depth(self) -> int:
        """Inputs."""

    @property
    def group(self) -> int:
        """Values of depth that share a scale."""

    @property
    def operands(self) -> tuple[Tensor | None, ...]:
        """What kernels get of it, in their order."""

    @property
    def parameters(self) -> tuple[Argument, ...]:
        """What kernels get at the end of their arguments."""

    @property
    def panel_kernel(self) -> str:
        """The kernel that writes it as bfloat16."""

    def dequantized(self) -> Tensor:
        """float32 `[columns, depth]`, exactly."""


@dataclass(frozen=True, slots=True)
class Int4Matrix:
    """W4A16: weights of `pack_int4`, bfloat16 scales and uint8 zero points (None: 8) of `pack_groups`."""

    weights: Tensor
    scales: Tensor
    zero_points: Tensor | None
    columns: int
    depth: int
    group: int

    format = WeightFormat.INT4
    panel_kernel = "w4_panel"

    def __post_init__(self) -> None:
        chunks = (padded_columns(self.columns) // CHUNK, depth_chunks(self.depth))
        groups = (group_count(self.depth, self.group), padded_columns(self.columns))
        assert self.weights.shape == (*chunks, 4, 32, 4), (self.weights.shape, chunks)
        assert self.weights.dtype == torch.int32, self.weights.dtype
        assert self.scales.shape == groups, (self.scales.shape, groups)
        assert self.scales.dtype == torch.bfloat16, self.scales.dtype
        assert self.zero_points is None or self.zero_points.shape == groups, (self.zero_points, groups)
        assert self.zero_points is None or self.zero_points.dtype == torch.uint8, self.zero_points.dtype

    @property
    def operands(self) -> tuple[Tensor | None, ...]:
        return self.weights, self.scales, self.zero_points

    @property
    def parameters(self) -> tuple[Argument, ...]:
        return (ctypes.c_int32(self.group.bit_length() - 1),)

    def dequantized(self) -> Tensor:
        """(value - zero) * scale."""
        values = unpack_int4(self.weights, self.columns, self.depth).float()
        scales = unpack_groups(self.scales, self.columns, self.depth, self.group).float()
        zeros = torch.full_like(scales, 8.0)
        if self.zero_points is not None:
            zeros = unpack_groups(self.zero_points, self.columns, self.depth, self.group).float()
        wide = torch.stack((scales, zeros)).repeat_interleave(self.group, dim=2)[:, :, : self.depth]
        return (values - wide[1]) * wide[0]


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

    format = WeightFormat.E4M3
    panel_kernel = "w8_panel"
    group = E4M3_GROUP
    parameters: ClassVar[tuple[Argument, ...]] = ()

    def __post_init__(self) -> None:
        chunks = (padded_columns(self.columns) // CHUNK, depth_chunks(self.depth))
        groups = (group_count(self.depth, self.group), padded_columns(self.columns))
        assert self.weights.shape == (*chunks, 4, 2, 32, 4), (self.weights.shape, chunks)
        assert self.weights.dtype == torch.int32, self.weights.dtype
        assert self.group_scales is None or self.group_scales.shape == groups, (self.group_scales, groups)
        assert self.group_scales is None or self.group_scales.dtype == torch.bfloat16, self.group_scales.dtype
        assert self.column_scales is None or self.column_scales.shape == groups[1:], (self.column_scales, groups)
        assert self.column_scales is None or self.column_scales.dtype == torch.float32, self.column_scales.dtype

    @property
    def operands(self) -> tuple[Tensor | None, ...]:
        return self.weights, self.group_scales, self.column_scales

    def dequantized(self) -> Tensor:
        """With both scales."""
        values = unpack_e4m3(self.weights, self.columns, self.depth).float()
        if self.group_scales is not None:
            scales = unpack_groups(self.group_scales, self.columns, self.depth, self.group).float()
            values *= scales.repeat_interleave(self.group, dim=1)[:, : self.depth]
        if self.column_scales is not None:
            values *= self.column_scales[: self.columns, None]
        return values
