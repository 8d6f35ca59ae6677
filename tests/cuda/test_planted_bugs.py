"""Five known mistakes, each switched on in the emulation, each found: a wrong result, its checks, or a sanitizer.

Every case runs without its bug first, so that what is found is the bug.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from llmscale.cuda.kv_blocks import BlockList, PackedLayout, launch_copy, launch_pack
from llmscale.cuda.launch import Launcher
from llmscale.cuda.matmul import launch_matmul, make_workspace
from tests.cuda.emulator import HOPPER, EmulationError, Emulator, PlantedBug, SanitizedEmulator
from tests.cuda.weights import assert_rounded_once, int4_case

CPU = torch.device("cpu")


def multiply(launcher: Launcher) -> None:
    """Several iterations of depth per block, whose warps then meet in the memory of the ring."""
    case = int4_case(16, 128, 2_048, 64, zero_points=True)
    y = torch.full((16, 128), float("nan"), dtype=torch.bfloat16)
    launch_matmul(launcher, case.x, case.matrix, make_workspace(128, HOPPER, CPU), y)
    assert_rounded_once(y, case.expected)


def copy(launcher: Launcher) -> None:
    """More pieces than the ring has stages."""
    source = torch.randint(0, 255, (4, 200_000), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    target = torch.zeros_like(source)
    blocks = BlockList.of([0, 1, 2, 3], [3, 1, 0, 2], source, target, CPU)
    launch_copy(launcher, source, target, blocks, thread_blocks=1)
    assert torch.equal(target[[3, 1, 0, 2]], source)


def pack(launcher: Launcher) -> None:
    region = torch.ones(1, 1, 2, 1, 32, 64, dtype=torch.bfloat16)
    layout = PackedLayout.of(region)
    packed = torch.zeros(1, layout.packed_block_bytes, dtype=torch.uint8)
    launch_pack(launcher, region, packed, BlockList.of([0], [0], region, packed, CPU), layout)
    assert (packed[0, : 2 * 32 * 64] == 0x7E).all()


@pytest.mark.parametrize(
    ("bug", "case"),
    [
        (PlantedBug.NO_BARRIER_BEFORE_REUSE, multiply),
        (PlantedBug.NO_WAIT_FOR_COPY, multiply),
        (PlantedBug.NO_WAIT_FOR_STORE, copy),
        (PlantedBug.LANE_ABSENT_FROM_SHUFFLE, pack),
    ],
)
def test_a_planted_bug_is_found_with_every_seed(bug: PlantedBug, case: Callable[[Launcher], None]) -> None:
    for seed in (1, 2, 3):
        case(Emulator(seed))
        with pytest.raises((AssertionError, EmulationError)):
            case(Emulator(seed, bug=bug))


def test_a_row_read_past_the_end_is_found_by_the_sanitizer_with_its_line() -> None:
    case = int4_case(5, 128, 256, 64, zero_points=False)

    def run(launcher: Launcher) -> None:
        y = torch.full((5, 128), float("nan"), dtype=torch.bfloat16)
        launch_matmul(launcher, case.x, case.matrix, make_workspace(128, HOPPER, CPU), y)
        assert_rounded_once(y, case.expected)

    run(SanitizedEmulator())
    with pytest.raises(EmulationError, match="heap-buffer-overflow") as found:
        run(SanitizedEmulator(bug=PlantedBug.ROW_PAST_THE_END))
    assert "w4a16_matmul_8_rows" in str(found.value)


def test_a_thread_that_never_comes_to_a_barrier_is_a_deadlock() -> None:
    with pytest.raises(EmulationError, match="deadlock"):
        pack(Emulator(bug=PlantedBug.LANE_ABSENT_FROM_SHUFFLE))
