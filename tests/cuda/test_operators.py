"""The torch operators: CPU implementation against float64 and against the kernels, shapes for tracing, panels."""

from __future__ import annotations

import pytest
import torch

from llmscale.cuda.matmul import launch_matmul, make_workspace
from llmscale.cuda.operators import (
    multiply_by_panels,
    w4a16_matmul,
    w8a16_matmul,
)
from tests.cuda.emulator import HOPPER, Emulator
from tests.cuda.weights import assert_rounded_once, e4m3_case, int4_case

NOTHING = torch.zeros(0, dtype=torch.uint8)


@pytest.mark.parametrize("zero_points", [False, True])
@pytest.mark.parametrize("rows", [1, 7, 65])
def test_int4_on_the_cpu_is_the_product_of_the_dequantized_matrix(rows: int, zero_points: bool) -> None:
    case = int4_case(rows, 130, 136, 64, zero_points=zero_points)
    matrix = case.matrix
    assert torch.equal(matrix.dequantized().double(), case.dequantized)
    y = w4a16_matmul(case.x, matrix.weights, matrix.scales, matrix.zero_points, NOTHING, 130, 64)
    assert_rounded_once(y, case.expected)


@pytest.mark.parametrize(("groups", "channels"), [(True, False), (False, True)])
def test_e4m3_on_the_cpu_is_the_product_of_the_dequantized_matrix(groups: bool, channels: bool) -> None:
    case = e4m3_case(5, 130, 136, groups=groups, channels=channels)
    matrix = case.matrix
    torch.testing.assert_close(matrix.dequantized().double(), case.dequantized, rtol=1e-6, atol=0)
    y = w8a16_matmul(case.x, matrix.weights, matrix.group_scales, matrix.column_scales, NOTHING, 130)
    assert_rounded_once(y, case.expected)


def test_operators_pass_torchs_own_checks() -> None:
    four, eight = int4_case(3, 64, 64, 32, zero_points=True), e4m3_case(3, 64, 64, groups=True, channels=True)
    arguments = (four.x, four.matrix.weights, four.matrix.scales, four.matrix.zero_points, NOTHING, 64, 32)
    torch.library.opcheck(w4a16_matmul, arguments, test_utils=("test_schema", "test_faketensor"))
    scales = (eight.matrix.group_scales, eight.matrix.column_scales)
    torch.library.opcheck(
        w8a16_matmul,
        (eight.x, eight.matrix.weights, *scales, NOTHING, 64),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_kernel_and_cpu_differ_by_the_order_of_sums_only() -> None:
    case = int4_case(6, 128, 512, 128, zero_points=True)
    matrix = case.matrix
    y = torch.full((6, 128), float("nan"), dtype=torch.bfloat16)
    launch_matmul(Emulator(), case.x, matrix, make_workspace(128, HOPPER, torch.device("cpu")), y)
    on_cpu = w4a16_matmul(case.x, matrix.weights, matrix.scales, matrix.zero_points, NOTHING, 128, 128)
    # One bfloat16 step apart at most, where the exact sum lies near the middle of two.
    torch.testing.assert_close(y, on_cpu, rtol=2**-7, atol=1e-3)


def test_panels_of_any_width_make_the_whole_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmscale.cuda.operators.MAX_PANEL_BYTES", 64 * 264 * 2)
    case = int4_case(70, 200, 264, 64, zero_points=True)
    emulator = Emulator()
    y = torch.full((70, 200), float("nan"), dtype=torch.bfloat16)
    multiply_by_panels(emulator, case.x, case.matrix, y)
    assert len(emulator.launches) == 4
    expected = case.x.double() @ case.dequantized.bfloat16().double().T
    assert_rounded_once(y, expected)
