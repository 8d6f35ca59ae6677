"""What one token's key or value of one head takes in a KV cache, in every format that there is. Plain arithmetic.

Whoever sizes a cache and whoever lays it out ask the same function. It does not know blocks or layers.
"""

from __future__ import annotations

DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4, "int8": 1}
SCALE_BYTES = {"int8": 4}
"""Of the scale that a row of such a format has."""


def row_bytes(head_dim: int, dtype: str) -> int:
    """Elements and their scale, where a row has one."""
    return head_dim * DTYPE_BYTES[dtype] + SCALE_BYTES.get(dtype, 0)
