"""Every kernel once under AddressSanitizer and UndefinedBehaviorSanitizer: odd sizes, buffers of exactly their size.

One launch is one process of about 0.2 s, so there is one case per kernel and no grid of sizes.
"""

from __future__ import annotations

import pytest
import torch

from llmscale.cuda.kv_blocks import (
    BlockList,
    PackedLayout,
    launch_copy,
    launch_pack,
    launch_unpack,
    packed_blocks,
    unpacked_blocks,
)
from llmscale.cuda.matmul import launch_matmul, launch_panel, make_workspace
from tests.cuda.emulator import ADA, HOPPER, SanitizedEmulator
from tests.cuda.weights import assert_rounded_once, e4m3_case, int4_case

CPU = torch.device("cpu")


@pytest.mark.parametrize("rows", [3, 11, 27, 50])
@pytest.mark.parametrize("group", [32, 64])
def test_int4_matmuls_touch_nothing_but_theirs(rows: int, group: int) -> None:
    case = int4_case(rows, 137, 776, group, zero_points=True)
    y = torch.full((rows, 137), float("nan"), dtype=torch.bfloat16)
    launch_matmul(SanitizedEmulator(seed=rows), case.x, case.matrix, make_workspace(137, HOPPER, CPU), y)
    assert_rounded_once(y, case.expected)


@pytest.mark.parametrize("rows", [3, 11, 27, 50])
def test_e4m3_matmuls_touch_nothing_but_theirs(rows: int) -> None:
    case = e4m3_case(rows, 137, 520, groups=True, channels=True)
    y = torch.full((rows, 137), float("nan"), dtype=torch.bfloat16)
    launch_matmul(SanitizedEmulator(seed=rows), case.x, case.matrix, make_workspace(137, HOPPER, CPU), y)
    assert_rounded_once(y, case.expected)


def test_a_panel_touches_nothing_but_its_own() -> None:
    case = int4_case(1, 137, 328, 64, zero_points=True)
    panel = torch.full((73, 328), float("nan"), dtype=torch.bfloat16)
    launch_panel(SanitizedEmulator(), case.matrix, 64, panel)
    assert torch.equal(panel, case.dequantized[64:137].bfloat16())
    eight = e4m3_case(1, 137, 328, groups=True, channels=True)
    panel.fill_(float("nan"))
    launch_panel(SanitizedEmulator(), eight.matrix, 64, panel)
    assert torch.equal(panel, eight.matrix.dequantized()[64:].bfloat16())


@pytest.mark.parametrize("limits", [HOPPER, ADA], ids=["bulk", "loads"])
def test_copies_touch_nothing_but_their_blocks(limits) -> None:
    source = torch.randint(0, 255, (4, 70_000), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    target = torch.zeros(3, 70_000, dtype=torch.uint8)
    blocks = BlockList.of([3, 0], [0, 2], source, target, CPU)
    launch_copy(SanitizedEmulator(limits=limits), source, target, blocks, thread_blocks=2)
    assert torch.equal(target[[0, 2]], source[[3, 0]])


def test_packing_touches_nothing_but_its_blocks() -> None:
    region = torch.randn(3, 1, 2, 2, 5, 48, generator=torch.Generator().manual_seed(2)).bfloat16()
    layout = PackedLayout.of(region)
    packed = torch.zeros(2, layout.packed_block_bytes, dtype=torch.uint8)
    blocks = BlockList.of([2, 0], [0, 1], region, packed, CPU)
    launch_pack(SanitizedEmulator(), region, packed, blocks, layout)
    assert torch.equal(packed, packed_blocks(region[[2, 0]], layout))
    back = torch.zeros_like(region)
    launch_unpack(SanitizedEmulator(), packed, back, BlockList.of([0, 1], [2, 0], packed, back, CPU), layout)
    assert torch.equal(back[[2, 0]], unpacked_blocks(packed, layout).view(2, *region.shape[1:]))
