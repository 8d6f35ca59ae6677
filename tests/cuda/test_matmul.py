"""The weight matmuls on the emulation: every variant against float64, over odd sizes, seeds and numbers of blocks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from llmscale.cuda.fragment_order import CHUNK
from llmscale.cuda.matmul import launch_matmul, launch_panel, make_workspace
from llmscale.cuda.matmul_plan import partial_sum_bytes
from tests.cuda.emulator import ADA, HOPPER, SEEDS, Emulator
from tests.cuda.weights import assert_rounded_once, e4m3_case, int4_case

CPU = torch.device("cpu")


def poisoned(rows: int, columns: int) -> torch.Tensor:
    return torch.full((rows, columns), float("nan"), dtype=torch.bfloat16)


def poisoned_workspace(columns: int, limits=HOPPER) -> torch.Tensor:
    workspace = make_workspace(columns, limits, CPU)
    workspace[: partial_sum_bytes(limits)] = 0xFF
    return workspace


@pytest.mark.parametrize("zero_points", [False, True], ids=["symmetric", "zero-points"])
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize(
    ("rows", "columns", "depth"),
    [(1, 130, 512), (7, 200, 776), (8, 1, 64), (9, 384, 256), (16, 129, 1032), (33, 96, 320), (64, 136, 512)],
)
def test_int4_products_are_those_of_float64_rounded_once(
    rows: int, columns: int, depth: int, group: int, zero_points: bool
) -> None:
    case = int4_case(rows, columns, depth, group, zero_points=zero_points, seed=rows + group)
    workspace = poisoned_workspace(columns)
    y = poisoned(rows, columns)
    launch_matmul(Emulator(seed=rows), case.x, case.matrix, workspace, y)
    assert_rounded_once(y, case.expected)


@pytest.mark.parametrize(("groups", "channels"), [(False, True), (True, False), (True, True), (False, False)])
@pytest.mark.parametrize(
    ("rows", "columns", "depth"), [(1, 130, 512), (8, 65, 136), (16, 256, 328), (17, 40, 256), (64, 129, 264)]
)
def test_e4m3_products_are_those_of_float64_rounded_once(
    rows: int, columns: int, depth: int, groups: bool, channels: bool
) -> None:
    case = e4m3_case(rows, columns, depth, groups=groups, channels=channels)
    y = poisoned(rows, columns)
    launch_matmul(Emulator(seed=rows), case.x, case.matrix, poisoned_workspace(columns), y)
    assert_rounded_once(y, case.expected)


def test_every_order_of_threads_and_blocks_gives_the_same_bits() -> None:
    case = int4_case(5, 300, 2_048, 64, zero_points=True)
    results = []
    for seed in (*SEEDS, 3, 4):
        y = poisoned(5, 300)
        launch_matmul(Emulator(seed), case.x, case.matrix, poisoned_workspace(300), y)
        results.append(y)
    assert all(torch.equal(result, results[0]) for result in results)
    assert_rounded_once(results[0], case.expected)


@pytest.mark.parametrize("multiprocessors", [1, 2, 5, 13])
def test_tiles_divided_among_any_number_of_blocks_are_added_up_once(multiprocessors: int) -> None:
    limits = replace(HOPPER, multiprocessors=multiprocessors)
    emulator = Emulator(seed=multiprocessors, limits=limits)
    case = int4_case(3, 384, 2_304, 128, zero_points=False)
    workspace = poisoned_workspace(384, limits)
    for _ in range(2):
        y = poisoned(3, 384)
        launch_matmul(emulator, case.x, case.matrix, workspace, y)
        assert_rounded_once(y, case.expected)
        counts = workspace[partial_sum_bytes(limits) :]
        assert not counts.any(), "arrival counts must be zero for the next launch"
    assert emulator.launches[0].grid[0] == min(2 * multiprocessors, 3 * 9 // 2)


def test_rows_that_do_not_fit_a_small_device_take_several_launches() -> None:
    case = e4m3_case(64, 128, 256, groups=False, channels=True)
    emulator = Emulator(limits=ADA)
    y = poisoned(64, 128)
    launch_matmul(emulator, case.x, case.matrix, poisoned_workspace(128, ADA), y)
    assert [launch.kernel for launch in emulator.launches] == ["w8a16_matmul_32_rows"] * 2
    assert_rounded_once(y, case.expected)


def test_rows_behind_the_last_are_not_written() -> None:
    case = int4_case(5, 128, 256, 64, zero_points=False)
    y = poisoned(8, 128)
    launch_matmul(Emulator(), case.x, case.matrix, poisoned_workspace(128), y[:5])
    assert y[:5].isfinite().all()
    assert y[5:].isnan().all()


@pytest.mark.parametrize(("groups", "channels"), [(False, True), (True, False), (True, True), (False, False)])
def test_an_e4m3_panel_is_the_dequantized_matrix(groups: bool, channels: bool) -> None:
    case = e4m3_case(1, 200, 264, groups=groups, channels=channels)
    for first in range(0, 200, CHUNK):
        panel = poisoned(min(72, 200 - first), 264)
        launch_panel(Emulator(seed=1), case.matrix, first, panel)
        assert torch.equal(panel, case.matrix.dequantized()[first : first + 72].bfloat16())


@pytest.mark.parametrize("zero_points", [False, True])
@pytest.mark.parametrize(("columns", "depth", "group"), [(130, 328, 64), (64, 64, 32), (200, 520, 128)])
def test_a_panel_is_the_dequantized_matrix(columns: int, depth: int, group: int, zero_points: bool) -> None:
    case = int4_case(1, columns, depth, group, zero_points=zero_points)
    for first in range(0, columns, CHUNK):
        panel = poisoned(min(72, columns - first), depth)
        launch_panel(Emulator(seed=1), case.matrix, first, panel)
        # (value - zero) * scale is exact in float64, so one rounding to bfloat16 is all there is.
        assert torch.equal(panel, case.dequantized[first : first + 72].bfloat16())
