"""Random weights with their products in float64, and the rounding that a kernel's result may have.

Draws from a seed of its own. Knows the formats of cuda/README.md only by the packing functions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llmscale.cuda.fragment_order import pack_e4m3, pack_groups, pack_int4, padded_columns
from llmscale.cuda.matrices import E4m3Matrix, Int4Matrix


@dataclass(frozen=True, slots=True)
class Int4Case:
    matrix: Int4Matrix
    dequantized: Tensor
    x: Tensor

    @property
    def expected(self) -> Tensor:
        return self.x.double() @ self.dequantized.T


def int4_case(rows: int, columns: int, depth: int, group: int, *, zero_points: bool, seed: int = 0) -> Int4Case:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(0, 16, (columns, depth), dtype=torch.uint8, generator=generator)
    groups = -(-depth // group)
    signs = torch.randint(0, 2, (columns, groups), generator=generator) * 2 - 1
    scales = ((torch.rand(columns, groups, generator=generator) * 0.1 + 0.01) * signs).bfloat16()
    zeros = torch.randint(0, 16, (columns, groups), dtype=torch.uint8, generator=generator)
    if not zero_points:
        zeros.fill_(8)
    matrix = Int4Matrix(
        pack_int4(values),
        pack_groups(scales, depth, group),
        pack_groups(zeros, depth, group) if zero_points else None,
        columns,
        depth,
        group,
    )
    offsets = values.double() - zeros.double().repeat_interleave(group, 1)[:, :depth]
    dequantized = offsets * scales.double().repeat_interleave(group, 1)[:, :depth]
    return Int4Case(matrix, dequantized, torch.randn(rows, depth, generator=generator).bfloat16())


@dataclass(frozen=True, slots=True)
class E4m3Case:
    matrix: E4m3Matrix
    dequantized: Tensor
    x: Tensor

    @property
    def expected(self) -> Tensor:
        return self.x.double() @ self.dequantized.T


def e4m3_case(rows: int, columns: int, depth: int, *, groups: bool, channels: bool, seed: int = 0) -> E4m3Case:
    generator = torch.Generator().manual_seed(seed)
    values = (torch.randn(columns, depth, generator=generator) * 100).clamp(-448, 448).to(torch.float8_e4m3fn)
    dequantized = values.double()
    group_scales = column_scales = None
    if groups:
        drawn = (torch.rand(columns, -(-depth // 128), generator=generator) * 0.01).bfloat16()
        dequantized = dequantized * drawn.double().repeat_interleave(128, 1)[:, :depth]
        group_scales = pack_groups(drawn, depth, 128)
    if channels:
        per_column = torch.rand(columns, generator=generator) * 0.01
        dequantized = dequantized * per_column.double()[:, None]
        column_scales = torch.zeros(padded_columns(columns))
        column_scales[:columns] = per_column
    matrix = E4m3Matrix(pack_e4m3(values), group_scales, column_scales, columns, depth)
    return E4m3Case(matrix, dequantized, torch.randn(rows, depth, generator=generator).bfloat16())


def assert_rounded_once(actual: Tensor, expected: Tensor) -> None:
    """Each element within half a bfloat16 step (2^-8) of the exact product, and float32's error of a sum on top.

    The sum's error is relative to what the whole row of products has, not to a sum that happens to be near zero.
    """
    assert actual.isfinite().all(), "a result was not written"
    error = (actual.double() - expected).abs()
    bound = expected.abs() * 2**-7.99 + expected.square().mean().sqrt() * 2e-5
    assert (error <= bound).all(), f"worst error is {(error / bound).max():.3g} times the bound"
