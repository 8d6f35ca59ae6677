"""The buffers of a step, allocated once for the largest step and cut to the rows of each.

Fresh buffers would cost more than the arithmetic of a small step: above 128 KiB the C allocator maps and faults in new
pages every time. All layers share them, so their size does not grow with depth. It does not know what is computed.
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
class Activations:
    """Views of T rows. `residual` [T, H] is the stream, `normed` [T, H] the input of a part, `delta` [T, H] its output;
    `qkv` [T, (Q + 2 K) D], `query` and `heads` [T, Q D], `gate_up` [T, 2 F], `inner` [T, F]."""

    residual: Tensor
    normed: Tensor
    delta: Tensor
    qkv: Tensor
    query: Tensor
    heads: Tensor
    gate_up: Tensor
    inner: Tensor


class ActivationBuffers:
    """Owns the memory for steps of up to `max_rows` rows."""

    __slots__ = ("_full", "_last", "_max_rows")

    def __init__(self, sizes: ActivationSizes, max_rows: int, dtype: torch.dtype, device: torch.device) -> None:
        def buffer(width: int) -> Tensor:
            return torch.zeros(max_rows, width, dtype=dtype, device=device)

        self._max_rows = max_rows
        self._full = Activations(
            residual=buffer(sizes.hidden),
            normed=buffer(sizes.hidden),
            delta=buffer(sizes.hidden),
            qkv=buffer(sizes.qkv),
            query=buffer(sizes.query),
            heads=buffer(sizes.query),
            gate_up=buffer(2 * sizes.inner),
            inner=buffer(sizes.inner),
        )
        self._last = self._full

    def rows(self, rows: int) -> Activations:
        """The first `rows` rows of every buffer; the views of the last size are kept, since decoding repeats it."""
        assert 0 < rows <= self._max_rows, (rows, self._max_rows)
        if self._last.residual.shape[0] != rows:
            full = self._full
            self._last = Activations(
                residual=full.residual[:rows],
                normed=full.normed[:rows],
                delta=full.delta[:rows],
                qkv=full.qkv[:rows],
                query=full.query[:rows],
                heads=full.heads[:rows],
                gate_up=full.gate_up[:rows],
                inner=full.inner[:rows],
            )
        return self._last
