"""Which variant of a weight matmul runs, on how many blocks, with how much shared memory and workspace.

The same arithmetic as `cuda/include/llmscale/weight_matmul.cuh` and `stream_k.cuh`; tests compare the two for every
variant. Pure and O(1). Does not know tensors.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from llmscale.cuda.fragment_order import CHUNK, GROUPS, PADDED_COLUMNS, padded_columns
from llmscale.cuda.launch import DeviceLimits

MAX_ROWS = 64
"""Of one launch. Above it the product is bound by arithmetic, which cuBLAS on a dequantized panel does better."""
STAGES = 4
THREADS = 256
MIN_ITERATIONS_PER_BLOCK = 2
"""Fewer would spend more on filling the ring than on products."""
RESERVED_SHARED_BYTES = 1024
"""Of each resident block, by the driver, since compute capability 8."""


class WeightFormat(enum.Enum):
    """Formats with kernels; the value begins their names."""

    INT4 = "w4a16_matmul"
    E4M3 = "w8a16_matmul"


@dataclass(frozen=True, slots=True)
class MatmulShape:
    """`rows` of x, `columns` of y, `depth` of both; `group` elements of depth share a scale."""

    format: WeightFormat
    rows: int
    columns: int
    depth: int
    group: int

    def __post_init__(self) -> None:
        assert self.rows > 0, self.rows
        assert self.columns > 0, self.columns
        assert self.depth > 0, self.depth
        assert self.depth % 8 == 0, self.depth
        assert self.group in GROUPS, self.group


@dataclass(frozen=True, slots=True)
class MatmulPlan:
    """A kernel, and what one launch of it over at most `rows` rows needs."""

    kernel: str
    rows: int
    step_depth: int
    blocks: int
    shared_bytes: int


def plan_matmul(shape: MatmulShape, limits: DeviceLimits) -> MatmulPlan:
    """The smallest variant that has all rows, or the largest that fits the device's shared memory.

    With the latter the caller launches once per `rows`. Raises nothing: the variants of 8 rows fit every device since
    compute capability 8.0.
    """
    fitting = [rows for rows in (8, 16, 32, 64) if shared_bytes(shape, rows) <= limits.max_shared_bytes]
    assert fitting, limits
    rows = next((rows for rows in fitting if rows >= shape.rows), fitting[-1])
    shared = shared_bytes(shape, rows)
    step = step_depth(shape.format, rows)
    iterations = padded_columns(shape.columns) // PADDED_COLUMNS * -(-shape.depth // step)
    # The kernel of 64 rows needs more than half of the registers.
    by_registers = 1 if rows == 64 else 2
    by_memory = limits.shared_bytes_per_multiprocessor // (shared + RESERVED_SHARED_BYTES)
    resident = limits.multiprocessors * max(1, min(by_registers, by_memory))
    blocks = max(1, min(resident, iterations // MIN_ITERATIONS_PER_BLOCK))
    group_32 = "_group_32" if shape.group == 32 and shape.format is WeightFormat.INT4 else ""
    return MatmulPlan(f"{shape.format.value}_{rows}_rows{group_32}", rows, step, blocks, shared)


def depth_warps(weight_format: WeightFormat, rows: int) -> int:
    """Warps that share a tile's depth; the others have other columns."""
    return 4 if weight_format is WeightFormat.INT4 and rows <= 16 else 2


def step_depth(weight_format: WeightFormat, rows: int) -> int:
    """Depth of one iteration."""
    return CHUNK * depth_warps(weight_format, rows)


def shared_bytes(shape: MatmulShape, rows: int) -> int:
    """Of the variant with this many rows: a ring of stages, or the table in which warps meet, which reuses it."""
    warps = depth_warps(shape.format, rows)
    smallest_group = min(shape.group, 64) if shape.format is WeightFormat.INT4 else 128
    x = rows * (CHUNK * warps + 8) * 2
    weights = PADDED_COLUMNS * CHUNK * warps // (2 if shape.format is WeightFormat.INT4 else 1)
    per_group = PADDED_COLUMNS * (3 if shape.format is WeightFormat.INT4 else 2)
    stage = x + weights + CHUNK * warps // smallest_group * per_group
    sums = warps * rows * (PADDED_COLUMNS + 4) * 4
    return max(STAGES * stage, sums)


def max_columns_of(workspace_bytes: int, limits: DeviceLimits) -> int:
    """The widest matrix that a workspace of this size serves."""
    return max(0, workspace_bytes - partial_sum_bytes(limits)) // 4 * PADDED_COLUMNS


def workspace_bytes(max_columns: int, limits: DeviceLimits) -> int:
    """Bytes for partial sums of any launch, and for one arrival count per 128 columns behind them."""
    return partial_sum_bytes(limits) + padded_columns(max_columns) // PADDED_COLUMNS * 4


def partial_sum_bytes(limits: DeviceLimits) -> int:
    """Two tiles per block: 64 rows on one block per multiprocessor are as much as 32 on two."""
    return 2 * limits.multiprocessors * MAX_ROWS * PADDED_COLUMNS * 4
