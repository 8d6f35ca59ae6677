"""What this machine can do, measured in the run that it is compared with: memory bandwidth and matrix products.

Reading: the sum of a float32 array of 256 MiB, which no cache holds. Products: torch's own (oneDNN), 2048 cubed, in
bfloat16, float32 and int8. Takes about two seconds. The shares that rows state are of these figures, with their own
noise. `python -m bench.limits THREADS` prints them as JSON.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable

from bench.statistics import spread

_READ_BYTES = 256 << 20
_SIDE = 2_048
_REPEATS = 5


def measure_limits(threads: int | None = None) -> dict[str, float]:
    """`read_bytes_per_second`, `bf16_flops_per_second`, `fp32_flops_per_second`, `int8_ops_per_second`: medians of
    five.
    """
    import torch

    if threads is not None:
        torch.set_num_threads(threads)
    array = torch.ones(_READ_BYTES // 4)
    limits = {"read_bytes_per_second": _READ_BYTES / _median_seconds(array.sum)}
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        left = torch.randn(_SIDE, _SIDE).to(dtype)
        right = torch.randn(_SIDE, _SIDE).to(dtype)
        seconds = _median_seconds(lambda left=left, right=right: torch.nn.functional.linear(left, right))
        limits[f"{name}_flops_per_second"] = 2 * _SIDE**3 / seconds
    codes = torch.randint(-127, 127, (_SIDE, _SIDE), dtype=torch.int8)
    limits["int8_ops_per_second"] = 2 * _SIDE**3 / _median_seconds(lambda: torch._int_mm(codes, codes))
    return limits


def _median_seconds(call: Callable[[], object]) -> float:
    call()
    seconds = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return spread(seconds).median


if __name__ == "__main__":
    print(json.dumps(measure_limits(int(sys.argv[1]))))
