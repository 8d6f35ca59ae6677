"""Packing: the layout that cuda/README.md states, element by element, and back."""

from __future__ import annotations

import pytest
import torch

from llmscale.cuda.fragment_order import (
    GROUPS,
    group_count,
    pack_e4m3,
    pack_groups,
    pack_int4,
    padded_columns,
    unpack_e4m3,
    unpack_groups,
    unpack_int4,
)

SHAPES = [(128, 64), (1, 8), (130, 72), (257, 320)]


def drawn(columns: int, depth: int, below: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(columns * depth)
    return torch.randint(0, below, (columns, depth), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize(("columns", "depth"), SHAPES)
def test_an_int4_value_is_at_the_bits_that_the_layout_states(columns: int, depth: int) -> None:
    values = drawn(columns, depth, 16)
    packed = pack_int4(values).long() & 0xFFFFFFFF
    assert packed.shape == (padded_columns(columns) // 64, -(-depth // 64), 4, 32, 4)
    for column in range(0, columns, 7):
        for k in range(0, depth, 5):
            tile, half, g = column % 64 // 16, column % 16 // 8, column % 8
            k16, k8, t, pair = k % 64 // 16, k % 16 // 8, k % 8 // 2, k % 2
            word = int(packed[column // 64, k // 64, tile, 4 * g + t, k16])
            assert word >> (4 * (half + 2 * k8) + 16 * pair) & 15 == values[column, k]


@pytest.mark.parametrize(("columns", "depth"), SHAPES)
def test_an_e4m3_value_is_at_the_byte_that_the_layout_states(columns: int, depth: int) -> None:
    values = drawn(columns, depth, 0x7E)
    packed = pack_e4m3(values.view(torch.float8_e4m3fn)).view(torch.uint8)
    for column in range(0, columns, 7):
        for k in range(0, depth, 5):
            tile, half, g = column % 64 // 16, column % 16 // 8, column % 8
            k32, k16, k8, t, pair = k % 64 // 32, k % 32 // 16, k % 16 // 8, k % 8 // 2, k % 2
            at = 4 * (2 * k16 + k8) + 2 * pair + 1 - half
            lane = packed[column // 64, k // 64, tile, k32, 4 * g + t].view(-1)
            assert lane[at] == values[column, k]


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize(("columns", "depth"), SHAPES)
def test_a_scale_is_at_the_position_that_the_layout_states(columns: int, depth: int, group: int) -> None:
    scales = torch.randn(columns, -(-depth // group), generator=torch.Generator().manual_seed(3)).bfloat16()
    packed = pack_groups(scales, depth, group)
    assert packed.shape == (group_count(depth, group), padded_columns(columns))
    for column in range(columns):
        tile, half, g = column % 64 // 16, column % 16 // 8, column % 8
        at = column // 64 * 64 + 8 * g + 2 * tile + half
        assert torch.equal(packed[: scales.shape[1], at], scales[column])
    assert torch.equal(unpack_groups(packed, columns, depth, group), scales)


@pytest.mark.parametrize(("columns", "depth"), SHAPES)
def test_unpacking_gives_what_was_packed(columns: int, depth: int) -> None:
    values = drawn(columns, depth, 16)
    assert torch.equal(unpack_int4(pack_int4(values), columns, depth), values)
    floats = drawn(columns, depth, 0x7E).view(torch.float8_e4m3fn)
    back = unpack_e4m3(pack_e4m3(floats), columns, depth)
    assert torch.equal(back.view(torch.uint8), floats.view(torch.uint8))
