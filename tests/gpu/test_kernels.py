"""The emulation's checks on a device: products against float64, copies and packing bit for bit, and the operators."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from llmscale.cuda.block_copier import BlockCopier, Regions
from llmscale.cuda.device import CudaDevice, cuda_device
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
from llmscale.cuda.matrices import E4m3Matrix, Int4Matrix
from llmscale.cuda.operators import w4a16_matmul
from tests.cuda.weights import assert_rounded_once, e4m3_case, int4_case

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]
HERE = torch.device("cuda")
SHAPES = [(130, 520), (4_096, 4_096), (1_024, 14_336)]


@pytest.fixture
def device() -> CudaDevice:
    return cuda_device(0)


def there(matrix: Int4Matrix) -> Int4Matrix:
    moved = {field.name: getattr(matrix, field.name) for field in dataclasses.fields(matrix)}
    return Int4Matrix(
        **{name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in moved.items()}
    )


def poisoned(rows: int, columns: int) -> torch.Tensor:
    return torch.full((rows, columns), float("nan"), dtype=torch.bfloat16, device=HERE)


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("rows", [1, 7, 8, 16, 17, 33, 64])
@pytest.mark.parametrize(("columns", "depth"), SHAPES)
def test_int4_products_are_those_of_float64_rounded_once(
    device: CudaDevice, rows: int, columns: int, depth: int, group: int
) -> None:
    case = int4_case(rows, columns, depth, group, zero_points=rows % 2 == 1)
    workspace = make_workspace(columns, device.limits, HERE)
    results = []
    for _ in range(2):
        y = poisoned(rows, columns)
        launch_matmul(device, case.x.cuda(), there(case.matrix), workspace, y)
        results.append(y.cpu())
    assert torch.equal(*results), "equal launches must give equal bits"
    assert_rounded_once(results[0], case.expected)


@pytest.mark.parametrize("rows", [1, 8, 16, 33, 64])
@pytest.mark.parametrize(("columns", "depth"), SHAPES)
def test_e4m3_products_are_those_of_float64_rounded_once(
    device: CudaDevice, rows: int, columns: int, depth: int
) -> None:
    case = e4m3_case(rows, columns, depth, groups=True, channels=True)
    matrix = case.matrix
    assert matrix.group_scales is not None
    assert matrix.column_scales is not None
    moved = (matrix.weights.cuda(), matrix.group_scales.cuda(), matrix.column_scales.cuda())
    y = poisoned(rows, columns)
    workspace = make_workspace(columns, device.limits, HERE)
    launch_matmul(device, case.x.cuda(), E4m3Matrix(*moved, columns, depth), workspace, y)
    assert_rounded_once(y.cpu(), case.expected)


def test_a_panel_is_the_dequantized_matrix(device: CudaDevice) -> None:
    case = int4_case(1, 1_000, 1_032, 64, zero_points=True)
    panel = poisoned(936, 1_032)
    launch_panel(device, there(case.matrix), 64, panel)
    assert torch.equal(panel.cpu(), case.dequantized[64:].bfloat16())
    eight = e4m3_case(1, 1_000, 1_032, groups=False, channels=True).matrix
    assert eight.column_scales is not None
    moved = E4m3Matrix(eight.weights.cuda(), None, eight.column_scales.cuda(), 1_000, 1_032)
    launch_panel(device, moved, 64, panel)
    assert torch.equal(panel.cpu(), eight.dequantized()[64:].bfloat16())


@pytest.mark.parametrize("rows", [3, 200])
def test_the_operator_gives_the_same_in_a_graph(device: CudaDevice, rows: int) -> None:
    case = int4_case(rows, 1_024, 512, 128, zero_points=False)
    matrix, x = there(case.matrix), case.x.cuda()
    workspace = make_workspace(1_024, device.limits, HERE)
    arguments = (matrix.weights, matrix.scales, None, workspace, 1_024, 128)
    eager = w4a16_matmul(x, *arguments)
    stream = torch.cuda.Stream()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        w4a16_matmul(x, *arguments)
        stream.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            captured = w4a16_matmul(x, *arguments)
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(captured, eager)


@pytest.mark.parametrize("size", [16, 4_096, 40_976, 400_000, 2 << 20])
@pytest.mark.parametrize("to_device", [True, False])
def test_blocks_arrive_and_their_neighbours_stay(device: CudaDevice, size: int, to_device: bool) -> None:
    host = torch.randint(0, 255, (12, size), dtype=torch.uint8).pin_memory()
    here = torch.randint(0, 255, (12, size), dtype=torch.uint8, device=HERE)
    source, target = (host, here) if to_device else (here, host)
    sources, targets = [5, 0, 11, 3], [2, 9, 0, 7]
    before, wanted = target.cpu().clone(), source.cpu().clone()
    before[targets] = wanted[sources]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    for method in ("kernel", "engine"):
        with torch.cuda.stream(stream):
            if method == "kernel":
                blocks = BlockList.of(sources, targets, source, target, HERE)
                launch_copy(device, source, target, blocks)
            else:
                BlockCopier(device, HERE).copy(Regions(source, target), sources, targets)
        stream.synchronize()
        assert torch.equal(target.cpu(), before), method
        with torch.cuda.stream(stream):
            target[targets] = 0
        stream.synchronize()


def test_packed_blocks_are_torchs_bit_for_bit(device: CudaDevice) -> None:
    region = (torch.randn(6, 4, 2, 8, 32, 128) * torch.exp2(torch.rand(6, 4, 2, 8, 32, 128) * 20 - 12)).bfloat16()
    layout = PackedLayout.of(region)
    packed = torch.zeros(6, layout.packed_block_bytes, dtype=torch.uint8).pin_memory()
    here = region.cuda()
    order = [4, 2, 0]
    launch_pack(device, here, packed, BlockList.of(order, [1, 3, 5], here, packed, HERE), layout)
    torch.cuda.synchronize()
    assert torch.equal(packed[[1, 3, 5]], packed_blocks(region[order], layout))
    back = torch.zeros_like(here)
    launch_unpack(device, packed, back, BlockList.of([1, 3, 5], order, packed, back, HERE), layout)
    expected = unpacked_blocks(packed[[1, 3, 5]], layout).view(3, *region.shape[1:])
    assert torch.equal(back[order].cpu(), expected)
