"""Weight matmuls on a device: right against float64, then as a share of the copy rate, over the shapes of Llama models.

Up to 64 rows the figure is bytes of packed weights per second, above it operations per second; bfloat16 products of
torch on the same shape stand beside each. Draws weights at random in packed form.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

from bench.gpu_timing import DEVICE, ROTATING_BYTES, Budget, graph_microseconds, inverted, peer_microseconds
from bench.result import Row
from bench.statistics import Spread
from llmscale.cuda.device import cuda_device
from llmscale.cuda.fragment_order import depth_chunks, group_count, padded_columns
from llmscale.cuda.matmul import make_workspace
from llmscale.cuda.matrices import E4m3Matrix, Int4Matrix
from llmscale.cuda.operators import w4a16_matmul, w8a16_matmul

# Columns and depth of qkv, gate and up, and down of an 8B model, a square, and the same two of a 70B model.
SHAPES = ((6_144, 4_096), (28_672, 4_096), (4_096, 14_336), (8_192, 8_192), (57_344, 8_192), (8_192, 28_672))
BATCHES = (1, 4, 16, 32, 64, 128, 256)
GROUP = 128
MAX_RELATIVE_ERROR = 4e-3
"""Of a norm: a bfloat16 result is wrong by 2^-9.2 on average."""


def int4_matrix(columns: int, depth: int, group: int, *, zero_points: bool) -> Int4Matrix:
    """Random bits are random weights."""
    chunks = (padded_columns(columns) // 64, depth_chunks(depth), 4, 32, 4)
    groups = (group_count(depth, group), padded_columns(columns))
    weights = torch.randint(-(2**31), 2**31 - 1, chunks, dtype=torch.int32, device=DEVICE)
    scales = (torch.rand(groups, device=DEVICE) * 0.02).bfloat16()
    zeros = torch.randint(0, 16, groups, dtype=torch.uint8, device=DEVICE) if zero_points else None
    return Int4Matrix(weights, scales, zeros, columns, depth, group)


def e4m3_matrix(columns: int, depth: int) -> E4m3Matrix:
    """Random bytes but for NaN, with a scale per column."""
    chunks = (padded_columns(columns) // 64, depth_chunks(depth), 4, 2, 32, 4)
    data = torch.randint(0, 255, (*chunks[:-1], 16), dtype=torch.uint8, device=DEVICE)
    data[(data & 0x7F) == 0x7F] = 0
    scales = torch.rand(padded_columns(columns), device=DEVICE) * 0.01
    return E4m3Matrix(data.view(torch.int32).view(chunks), None, scales, columns, depth)


def multiply_int4(x: Tensor, matrix: Int4Matrix, workspace: Tensor) -> Tensor:
    """Through the operator, as a model does."""
    return w4a16_matmul(x, matrix.weights, matrix.scales, matrix.zero_points, workspace, matrix.columns, matrix.group)


def multiply_e4m3(x: Tensor, matrix: E4m3Matrix, workspace: Tensor) -> Tensor:
    """The same for 8 bits."""
    return w8a16_matmul(x, matrix.weights, matrix.group_scales, matrix.column_scales, workspace, matrix.columns)


def workspace_for(columns: int) -> Tensor:
    """Of the current device."""
    return make_workspace(columns, cuda_device(0).limits, DEVICE)


def correctness(budget: Budget) -> Iterator[Row]:
    """Relative errors of norms. Raises AssertionError where one is more than rounding."""
    for columns, depth in ((130, 520), (4_096, 4_096), (1_024, 14_336)):
        for rows in (1, 7, 16, 33, 64, 130):
            if not budget.allows():
                continue
            x = torch.randn(rows, depth, device=DEVICE).bfloat16()
            workspace = workspace_for(columns)
            for group in (32, 64, 128):
                four = int4_matrix(columns, depth, group, zero_points=group == 64)
                expected = x.double() @ four.dequantized().double().T
                yield _error(f"int4-{group}/{rows}x{columns}x{depth}", multiply_int4(x, four, workspace), expected)
            eight = e4m3_matrix(columns, depth)
            expected = x.double() @ eight.dequantized().double().T
            yield _error(f"e4m3/{rows}x{columns}x{depth}", multiply_e4m3(x, eight, workspace), expected)


def _error(case: str, actual: Tensor, expected: Tensor) -> Row:
    error = float((actual.double() - expected).norm() / expected.norm())
    assert error <= MAX_RELATIVE_ERROR, (
        f"{case}: the relative error is {error:.3g}, rounding makes {MAX_RELATIVE_ERROR}"
    )
    return Row(f"correct/{case}", error, "relative error", error, error, 1)


def int4_rates(budget: Budget, limits: dict[str, float]) -> Iterator[Row]:
    """Of every shape and batch."""
    for columns, depth in SHAPES:
        packed_bytes = columns * depth // 2 + 2 * columns * depth // GROUP
        copies = max(2, ROTATING_BYTES // packed_bytes)
        matrices = [int4_matrix(columns, depth, GROUP, zero_points=False) for _ in range(copies)]
        dense = [torch.randn(columns, depth, device=DEVICE).bfloat16() for _ in range(max(2, copies // 4))]
        workspace = workspace_for(columns)
        for rows in BATCHES:
            if not budget.allows():
                continue
            x = torch.randn(rows, depth, device=DEVICE).bfloat16()
            own = graph_microseconds([lambda m=m, x=x, w=workspace: multiply_int4(x, m, w) for m in matrices])
            torchs = graph_microseconds([lambda d=d, x=x: functional.linear(x, d) for d in dense])
            peers: dict[str, float | str] = {"own us": own.median, "torch bf16 us": torchs.median}
            yield _rate("int4", (rows, columns, depth), packed_bytes, own, limits, peers)


def e4m3_rates(budget: Budget, limits: dict[str, float]) -> Iterator[Row]:
    """The same; torch's own FP8 product, which quantizes x as well, stands beside where the device has it."""
    one = torch.ones((), device=DEVICE)
    for columns, depth in SHAPES:
        copies = max(2, ROTATING_BYTES // (columns * depth))
        matrices = [e4m3_matrix(columns, depth) for _ in range(copies)]
        plain = [torch.randn(columns, depth, device=DEVICE).to(torch.float8_e4m3fn) for _ in range(copies)]
        workspace = workspace_for(columns)
        for rows in (batch for batch in BATCHES if batch <= 64):
            if not budget.allows():
                continue
            x = torch.randn(rows, depth, device=DEVICE).bfloat16()
            own = graph_microseconds([lambda m=m, x=x, w=workspace: multiply_e4m3(x, m, w) for m in matrices])
            peers: dict[str, float | str] = {"own us": own.median}
            x8 = x.to(torch.float8_e4m3fn)
            # Below sm_89 there is none.
            peers["torch fp8 us"] = peer_microseconds([lambda w=w, x8=x8: _scaled_product(x8, w, one) for w in plain])
            yield _rate("e4m3", (rows, columns, depth), columns * depth, own, limits, peers)


def _scaled_product(x: Tensor, weights: Tensor, scale: Tensor) -> Tensor:
    return torch._scaled_mm(x, weights.t(), scale_a=scale, scale_b=scale, out_dtype=torch.bfloat16)


def _rate(
    name: str,
    shape: tuple[int, int, int],
    packed_bytes: int,
    own: Spread,
    limits: dict[str, float],
    peers: dict[str, float | str],
) -> Row:
    rows, columns, depth = shape
    case = f"{name}/{rows}x{columns}x{depth}"
    if rows <= 64:
        rate = inverted(own, packed_bytes / 1e3)
        return Row.of(case, "GB/s", rate, limit=limits.get("copy_gigabytes_per_second"), peers=peers)
    rate = inverted(own, 2 * rows * columns * depth / 1e6)
    return Row.of(case, "TFLOP/s", rate, limit=limits.get("bf16_teraflops"), peers=peers)
