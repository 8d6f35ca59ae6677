"""Products by oneDNN, as torch calls it: the fastest that are not held to giving a row the same bits in every batch.

`python -m bench.onednn_products THREADS MATRIX`, such as `2 2048x8192`, prints the lines of
`rust/kernels/examples/matmul_rates.rs` for a matrix, packed anew for each number of rows, which one layout for all
phases may not be. Rows of int8 are quantized beforehand here and on the way there, so the comparison is kind to oneDNN.
Needs the extra `node`.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable

import torch

from bench.cpu_kernels import ROWS

ROUNDS = 7
LEAST_BYTES = 256 << 20
"""Of all copies of a matrix: more than a cache holds."""

Product = Callable[[int], object]
"""With one of the copies."""


def bf16_product(rows: int, outputs: int, inputs: int, copies: int) -> Product:
    """bfloat16 in and out, sums in float32."""
    input_rows = torch.randn(rows, inputs).bfloat16()
    ops = torch.ops.mkldnn
    weight = torch.randn(outputs, inputs).bfloat16()
    packed = [ops._reorder_linear_weight(weight, rows) for _ in range(copies)]
    return lambda copy: ops._linear_pointwise(input_rows, packed[copy], None, "none", [], "")


def int8_product(rows: int, outputs: int, inputs: int, copies: int) -> Product:
    """Unsigned bytes in, bfloat16 out, one scale per output."""
    input_rows = torch.randint(0, 255, (rows, inputs), dtype=torch.uint8)
    ops = torch.ops.onednn
    weight = torch.randint(-127, 127, (outputs, inputs), dtype=torch.int8)
    packed = [ops.qlinear_prepack(weight, list(input_rows.shape)) for _ in range(copies)]
    scales, zeros = torch.full((outputs,), 0.01), torch.zeros(outputs, dtype=torch.int64)

    def product(copy: int) -> object:
        return ops.qlinear_pointwise(
            input_rows, 0.02, 127, packed[copy], scales, zeros, None, 1.0, 0, torch.bfloat16, "none", [], ""
        )

    return product


FORMATS = {"bf16": (bf16_product, 2), "int8": (int8_product, 1)}
"""By name: what makes the product, and bytes of a weight."""


def seconds(product: Product, copies: int) -> list[float]:
    """Of one product, a value per round."""
    for copy in range(copies):
        product(copy)
    rounds = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for copy in range(copies):
            product(copy)
        rounds.append((time.perf_counter() - start) / copies)
    return rounds


def lines(name: str, outputs: int, inputs: int) -> list[str]:
    """One per number of rows."""
    make, weight_bytes = FORMATS[name]
    found = []
    for rows in ROWS:
        size = outputs * inputs * weight_bytes
        copies = max(LEAST_BYTES // size, 1)
        copies = max(copies // rows * 8, 1) if rows >= 64 else copies
        with torch.inference_mode():
            took = seconds(make(rows, outputs, inputs, copies), copies)
        median, operations = statistics.median(took), 2 * rows * outputs * inputs
        found.append(
            f"{name} {outputs:6} x {inputs:5}, {rows:4} rows: {median * 1e6:8.1f} us {size / median / 1e9:6.1f} GB/s "
            f"{operations / median / 1e9:7.1f} GOP/s (best {operations / min(took) / 1e9:.1f})"
        )
    return found


def main() -> None:
    """Prints those of both formats."""
    _, threads, matrix = sys.argv
    torch.set_num_threads(int(threads))
    torch.manual_seed(0)
    outputs, inputs = map(int, matrix.split("x"))
    for name in FORMATS:
        print("\n".join(lines(name, outputs, inputs)))


if __name__ == "__main__":
    main()
