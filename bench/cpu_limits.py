"""What bounds a case of `bench cpu` on this machine: bytes of weights against bandwidth, operations against products.

A share is of one limit, the nearest: prefill against products in the format's arithmetic (two operations per weight of
the layers and token), one stream against reading every weight once per token. Batches and servers have no single bound.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from bench.shapes import Shape

WEIGHT_BYTES = {"bf16": 2.0, "int8": 1.0, "int4": 0.5625}
"""Per weight; int4 with a scale of two bytes per 32 weights, as in Q4_0."""
OPERATIONS = {"bf16": "bf16_flops_per_second", "int8": "int8_ops_per_second", "int4": "int8_ops_per_second"}
"""int4 is computed in int8: nothing multiplies narrower."""


def measure(threads: int) -> dict[str, float]:
    """`bench.limits` in a process of its own, so that its threads and arrays are gone when others are measured."""
    root = Path(__file__).parent.parent
    command = [sys.executable, "-m", "bench.limits", str(threads)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def limit_of(case: str, scheme: str, shape: Shape, limits: dict[str, float]) -> float | None:
    """The most tokens per second that the machine allows; None where no single resource bounds the case."""
    if case.startswith("prefill"):
        return limits[OPERATIONS[scheme]] / (2 * shape.layer_parameters)
    if case == "decode1":
        weights = shape.layer_parameters + shape.head_parameters
        return limits["read_bytes_per_second"] / (WEIGHT_BYTES[scheme] * weights)
    return None
