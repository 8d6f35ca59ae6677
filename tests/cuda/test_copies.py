"""What is decided about copies on the host: runs of neighbours, and which method is predicted to be faster."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmscale.cuda.copy_choice import CopyCost, CopyCosts, CopyMeasurement, CopyMethod, fit_costs
from llmscale.cuda.copy_runs import Run, merge_runs


def test_neighbours_on_both_sides_are_one_run() -> None:
    assert merge_runs([3, 4, 5], [10, 11, 12]) == [Run(3, 10, 3)]
    assert merge_runs([5, 3, 4], [12, 10, 11]) == [Run(3, 10, 3)]


def test_neighbours_on_one_side_only_are_separate() -> None:
    assert merge_runs([3, 5], [10, 11]) == [Run(3, 10, 1), Run(5, 11, 1)]
    assert merge_runs([3, 4], [10, 12]) == [Run(3, 10, 1), Run(4, 12, 1)]
    assert merge_runs([4, 3], [10, 11]) == [Run(4, 10, 1), Run(3, 11, 1)]
    assert merge_runs([], []) == []


def test_a_block_that_would_be_written_twice_is_refused() -> None:
    with pytest.raises(AssertionError, match="two copies"):
        merge_runs([1, 2], [5, 5])


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), max_size=40, unique_by=lambda pair: pair[1]))
def test_runs_copy_what_the_lists_say_and_no_two_could_be_one(pairs: list[tuple[int, int]]) -> None:
    runs = merge_runs([source for source, _ in pairs], [target for _, target in pairs])
    copied = [(run.source + i, run.target + i) for run in runs for i in range(run.blocks)]
    assert copied == sorted(pairs, key=lambda pair: pair[1])
    ends = {(run.source + run.blocks, run.target + run.blocks) for run in runs}
    assert not ends & {(run.source, run.target) for run in runs}


def measured(cost: CopyCost, method: CopyMethod, noise: int = 0) -> list[CopyMeasurement]:
    shapes = [(1, 1), (1, 16), (4, 16), (16, 16), (1, 64), (64, 64)]
    return [
        CopyMeasurement(
            method, runs, blocks, size, cost.predicted_ns(runs, blocks * size) * (1_000 + noise * (i % 3)) // 1_000
        )
        for size in (65_536, 2_097_152)
        for i, (runs, blocks) in enumerate(shapes)
    ]


ENGINE = CopyCost(base_ns=8_000, run_ns=600, mebibyte_ns=19_000)
KERNEL = CopyCost(base_ns=12_000, run_ns=0, mebibyte_ns=20_500)


@pytest.mark.parametrize("noise", [0, 20])
def test_the_fit_finds_what_the_measurements_were_made_of(noise: int) -> None:
    found = fit_costs([*measured(ENGINE, CopyMethod.ENGINE, noise), *measured(KERNEL, CopyMethod.KERNEL, noise)])
    for cost, truth in ((found.engine, ENGINE), (found.kernel, KERNEL)):
        for runs, size in ((1, 1 << 20), (32, 64 << 20), (256, 16 << 20)):
            assert cost.predicted_ns(runs, size) == pytest.approx(
                truth.predicted_ns(runs, size), rel=0.001 + noise / 400
            )


def test_no_cost_is_below_zero_though_noise_would_make_it_so() -> None:
    odd = [CopyMeasurement(CopyMethod.KERNEL, runs, 64, 1 << 14, 30_000 - 100 * runs) for runs in (1, 16, 64)]
    found = fit_costs([*odd, *measured(ENGINE, CopyMethod.ENGINE)])
    assert min(found.kernel.base_ns, found.kernel.run_ns, found.kernel.mebibyte_ns) >= 0
    assert found.kernel.predicted_ns(16, 64 << 14) == pytest.approx(27_000, rel=0.15)


def test_many_small_runs_go_to_the_kernel_and_large_ones_to_the_engine() -> None:
    costs = CopyCosts(ENGINE, KERNEL)
    assert costs.choose(1, 64 << 20) is CopyMethod.ENGINE
    assert costs.choose(256, 256 * 16_384) is CopyMethod.KERNEL


def test_a_kernel_that_is_barely_faster_is_not_chosen() -> None:
    engine = CopyCost(0, 0, 100)
    assert CopyCosts(engine, CopyCost(0, 0, 81)).choose(1, 1 << 30) is CopyMethod.ENGINE
    assert CopyCosts(engine, CopyCost(0, 0, 80)).choose(1, 1 << 30) is CopyMethod.KERNEL
