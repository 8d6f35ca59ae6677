"""`Ops` in plain torch: the oracle that every other implementation is tested against, on any device.

Each operation is the reference function of its layer file, copied into the caller's buffer. It is written to be read,
not to be fast: attention loops over sequences. It does not know of native code.
"""

from __future__ import annotations

from torch import Tensor

from llmscale.layers import attention as attention_layer
from llmscale.layers import embedding, mlp, norm
from llmscale.layers.ops import AttentionConstants, KvLayer, StepRows


class ReferenceOps:
    """See `Ops` for shapes."""

    __slots__ = ("_rows",)

    def __init__(self) -> None:
        self._rows: StepRows | None = None

    def begin_step(self, rows: StepRows) -> None:
        """Keeps the rows."""
        self._rows = rows

    def embed(self, token_ids: Tensor, table: Tensor, out: Tensor) -> None:
        """`layers.embedding.embed`."""
        out.copy_(embedding.embed(token_ids, table))

    def rms_norm(self, x: Tensor, weight: Tensor, epsilon: float, out: Tensor) -> None:
        """`layers.norm.rms_norm`."""
        out.copy_(norm.rms_norm(x, weight, epsilon))

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, epsilon: float, out: Tensor) -> None:
        """The sum, then `layers.norm.rms_norm`."""
        residual.add_(x)
        out.copy_(norm.rms_norm(residual, weight, epsilon))

    def rotate_and_store(self, qkv: Tensor, attention: AttentionConstants, kv: KvLayer, query: Tensor) -> None:
        """`layers.attention.rotate_and_store`."""
        assert self._rows is not None, "begin_step comes first"
        query.copy_(attention_layer.rotate_and_store(qkv, attention, self._rows, kv.view()))

    def attend(self, query: Tensor, attention: AttentionConstants, kv: KvLayer, out: Tensor) -> None:
        """`layers.attention.attend`."""
        assert self._rows is not None, "begin_step comes first"
        out.copy_(attention_layer.attend(query, attention.spec, self._rows, kv.view()))

    def silu_mul(self, gate_up: Tensor, out: Tensor) -> None:
        """`layers.mlp.silu_mul`."""
        out.copy_(mlp.silu_mul(gate_up))
