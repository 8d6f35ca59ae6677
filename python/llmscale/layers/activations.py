"""The buffers of a step, allocated once for the largest step and cut to the rows of each.

Fresh buffers would cost more than the arithmetic of a small step: above 128 KiB the C allocator maps and faults in new
pages every time. All layers share them, so their size does not grow with depth. Inputs of matrix products are padded to
few row counts, because oneDNN compiles a product for each (1.1 to 1.5 ms, measured) and caches 1,024. It does not know
what is computed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class ActivationSizes:
    """Widths of the widest layer: hidden H, query heads Q D, fused projection (Q + 2 K) D, inner F."""

    hidden: int
    query: int
    qkv: int
    inner: int


@dataclass(frozen=True, slots=True)
class ProductInput:
    """A buffer that a matrix product reads: the step's rows, and the same with the rows of the padding behind them.

    Padding rows hold what earlier steps left there. Each row of a product depends on its own input row alone, so their
    results, which nobody reads, harm no one.
    """

    rows: Tensor
    padded: Tensor


@dataclass(frozen=True, slots=True)
class Activations:
    """Views of T rows, padded to P for products. `residual` [T, H] is the stream, `normed` [T, H] the input of a part,
    `query` [T, Q D], `heads` [T, Q D], `inner` [T, F]; `qkv` [P, (Q + 2 K) D], `gate_up` [P, 2 F] and `delta` [P, H]
    are room for products."""

    residual: Tensor
    normed: ProductInput
    query: Tensor
    heads: ProductInput
    inner: ProductInput
    qkv: Tensor
    gate_up: Tensor
    delta: Tensor


def padded_rows(rows: int) -> int:
    """The row count that a product is computed for: exact up to 16, then eight steps per doubling.

    Wastes less than an eighth of a product, 4 % on average; up to 2,048 rows there are 72 counts.
    """
    assert rows > 0
    step = 1 << max(0, rows.bit_length() - 4)
    return -(-rows // step) * step


class ActivationBuffers:
    """Owns the memory for steps of up to `max_rows` rows."""

    __slots__ = ("_last", "_max_rows", "_memory", "_rows")

    def __init__(self, sizes: ActivationSizes, max_rows: int, dtype: torch.dtype, device: torch.device) -> None:
        def memory(width: int) -> Tensor:
            return torch.zeros(padded_rows(max_rows), width, dtype=dtype, device=device)

        def product_input(width: int) -> ProductInput:
            padded = memory(width)
            return ProductInput(padded, padded)

        self._max_rows = max_rows
        self._memory = Activations(
            residual=memory(sizes.hidden),
            normed=product_input(sizes.hidden),
            query=memory(sizes.query),
            heads=product_input(sizes.query),
            inner=product_input(sizes.inner),
            qkv=memory(sizes.qkv),
            gate_up=memory(2 * sizes.inner),
            delta=memory(sizes.hidden),
        )
        self._rows = 0
        self._last = self._memory

    def rows(self, rows: int) -> Activations:
        """The first `rows` rows of every buffer; the views of the last size are kept, since decoding repeats it."""
        assert 0 < rows <= self._max_rows, (rows, self._max_rows)
        if self._rows != rows:
            memory, padded = self._memory, padded_rows(rows)
            self._rows = rows
            self._last = Activations(
                residual=memory.residual[:rows],
                normed=_cut(memory.normed, rows, padded),
                query=memory.query[:rows],
                heads=_cut(memory.heads, rows, padded),
                inner=_cut(memory.inner, rows, padded),
                qkv=memory.qkv[:padded],
                gate_up=memory.gate_up[:padded],
                delta=memory.delta[:padded],
            )
        return self._last


def _cut(memory: ProductInput, rows: int, padded: int) -> ProductInput:
    return ProductInput(memory.padded[:rows], memory.padded[:padded])
