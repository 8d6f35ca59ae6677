"""Plans: the same arithmetic as the kernels', on devices of several sizes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from llmscale.cuda.launch import DeviceLimits
from llmscale.cuda.matmul import make_workspace
from llmscale.cuda.matmul_plan import (
    MatmulShape,
    WeightFormat,
    max_columns_of,
    partial_sum_bytes,
    plan_matmul,
    shared_bytes,
    workspace_bytes,
)
from llmscale.cuda.sources import SOURCES, source_of
from tests.cuda.emulator import ADA, HOPPER, kernel_names
from tests.cuda.emulator import shared_bytes as source_shared_bytes
from tools import cuda_build

H200 = replace(HOPPER, multiprocessors=132)
A100 = DeviceLimits((8, 0), multiprocessors=108, max_shared_bytes=166_912, shared_bytes_per_multiprocessor=167_936)


@pytest.mark.parametrize("rows", [8, 16, 32, 64])
@pytest.mark.parametrize(
    ("weights", "group"),
    [(WeightFormat.INT4, 32), (WeightFormat.INT4, 64), (WeightFormat.INT4, 128), (WeightFormat.E4M3, 128)],
)
def test_shared_memory_of_every_variant_is_what_its_source_needs(weights: WeightFormat, group: int, rows: int) -> None:
    shape = MatmulShape(weights, rows, 4_096, 4_096, group)
    plan = plan_matmul(shape, HOPPER)
    assert plan.rows == rows
    assert plan.shared_bytes == shared_bytes(shape, rows) == source_shared_bytes(plan.kernel)


@pytest.mark.parametrize("limits", [ADA, A100, H200], ids=["sm_89", "sm_80", "sm_90"])
@pytest.mark.parametrize("weights", list(WeightFormat))
@pytest.mark.parametrize("rows", [1, 8, 9, 17, 33, 64])
def test_a_plan_fits_its_device(limits: DeviceLimits, weights: WeightFormat, rows: int) -> None:
    shape = MatmulShape(weights, rows, 6_144, 4_096, 128)
    plan = plan_matmul(shape, limits)
    assert plan.shared_bytes <= limits.max_shared_bytes
    resident = plan.blocks / limits.multiprocessors
    assert resident * (plan.shared_bytes + 1_024) <= limits.shared_bytes_per_multiprocessor
    assert 2 * plan.blocks * min(plan.rows, rows) * 128 * 4 <= partial_sum_bytes(limits)


def test_all_multiprocessors_have_two_blocks_of_few_rows_and_one_of_64() -> None:
    shape = MatmulShape(WeightFormat.INT4, 1, 28_672, 8_192, 128)
    assert plan_matmul(shape, H200).blocks == 264
    assert plan_matmul(replace(shape, rows=64), H200).blocks == 132


def test_a_small_matrix_has_fewer_blocks_than_iterations() -> None:
    plan = plan_matmul(MatmulShape(WeightFormat.INT4, 1, 128, 256, 32), H200)
    assert plan.blocks == 1


def test_a_workspace_serves_the_columns_that_it_was_made_for() -> None:
    workspace = make_workspace(1_000, HOPPER, torch.device("cpu"))
    assert workspace.numel() == workspace_bytes(1_000, HOPPER)
    assert max_columns_of(workspace.numel(), HOPPER) == 1_024
    assert max_columns_of(0, HOPPER) == 0


def test_every_kernel_has_a_source_and_every_source_is_there() -> None:
    assert {source_of(name) for name in kernel_names()} == set(SOURCES)
    assert {path.stem for path in cuda_build.kernel_files()} == set(SOURCES)
