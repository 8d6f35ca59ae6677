"""`Ops` in plain torch: the oracle that every other implementation is tested against, on any device.

Each operation is the reference function of its layer file, copied into the caller's buffer. It is written to be read, not
to be fast: attention loops over sequences. It does not know of native code.
"""

from __future__ import annotations

from torch import Tensor

from llmscale.layers import attention as attention_layer
from llmscale.layers import embedding, mlp, norm
from llmscale.layers.ops import HeadNorms, StepRows
from llmscale.models.spec import AttentionSpec


class ReferenceOps:
    """See `Ops` for shapes."""

    __slots__ = ()

    def embed(self, token_ids: Tensor, table: Tensor, out: Tensor) -> None:
        out.copy_(embedding.embed(token_ids, table))

    def rms_norm(self, x: Tensor, weight: Tensor, epsilon: float, out: Tensor) -> None:
        out.copy_(norm.rms_norm(x, weight, epsilon))

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, epsilon: float, out: Tensor) -> None:
        residual.add_(x)
        out.copy_(norm.rms_norm(residual, weight, epsilon))

    def rotate_and_store(
        self,
        qkv: Tensor,
        attention: AttentionSpec,
        norms: HeadNorms | None,
        rope_table: Tensor,
        rows: StepRows,
        kv_layer: Tensor,
    ) -> None:
        attention_layer.rotate_and_store(qkv, attention, norms, rope_table, rows, kv_layer)

    def attend(self, qkv: Tensor, attention: AttentionSpec, rows: StepRows, kv_layer: Tensor, out: Tensor) -> None:
        out.copy_(attention_layer.attend(qkv, attention, rows, kv_layer))

    def silu_mul(self, gate_up: Tensor, out: Tensor) -> None:
        out.copy_(mlp.silu_mul(gate_up))
