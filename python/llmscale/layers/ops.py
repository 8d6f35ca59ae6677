"""The elementwise and attention operations that a decoder needs, as one interface with interchangeable implementations.

`ReferenceOps` (torch, the oracle) and native implementations do the same arithmetic: float32 inside, one rounding to the
dtype of the output. Every operation writes into memory that the caller owns, so that a step allocates nothing. Matrix
products are not here; see `layers/linear.py`. It does not know models, steps of an engine, or who schedules.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from llmscale.models.spec import AttentionSpec


class StepRows(Protocol):
    """What attention needs to know about the rows of a step: T rows of S sequences, int32 tensors on the device.

    Rows of one sequence are consecutive, their positions ascend by one, and the last is the sequence's last KV token.
    """

    @property
    def sequences(self) -> int:
        """S."""

    @property
    def positions(self) -> Tensor:
        """[T] absolute position of each row."""

    @property
    def slot_mapping(self) -> Tensor:
        """[T] physical KV slot of each row: block * block_tokens + offset."""

    @property
    def query_start(self) -> Tensor:
        """[S + 1] first row of each sequence."""

    @property
    def sequence_lengths(self) -> Tensor:
        """[S] KV tokens of each sequence, this step's rows included."""

    @property
    def table_offsets(self) -> Tensor:
        """[S] where each sequence's block table begins in `block_tables`."""

    @property
    def block_tables(self) -> Tensor:
        """Flat block ids."""


class HeadNorms:
    """The weights `[head_dim]` of the RMS norms on query and key heads, and their epsilon."""

    __slots__ = ("epsilon", "key", "query")

    def __init__(self, query: Tensor, key: Tensor, epsilon: float) -> None:
        self.query = query
        self.key = key
        self.epsilon = epsilon


class Ops(Protocol):
    """Shapes: T rows, H hidden size, Q query and K key-value heads of D elements, B blocks of P tokens.

    `kv_layer` is one layer's view of the KV region, `[B, 2, K, P, D]` with keys first; the four inner axes are dense.
    """

    def embed(self, token_ids: Tensor, table: Tensor, out: Tensor) -> None:
        """`out[t] = table[token_ids[t]]`: int32 [T], [V, H], [T, H]."""

    def rms_norm(self, x: Tensor, weight: Tensor, epsilon: float, out: Tensor) -> None:
        """`out = x / sqrt(mean(x^2) + epsilon) * weight` over the last axis: [T, H], [H], [T, H]."""

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, epsilon: float, out: Tensor) -> None:
        """`residual += x`, rounded to its dtype; then `out = rms_norm(residual)`: [T, H] each."""

    def rotate_and_store(
        self,
        qkv: Tensor,
        attention: AttentionSpec,
        norms: HeadNorms | None,
        rope_table: Tensor,
        rows: StepRows,
        kv_layer: Tensor,
    ) -> None:
        """Normalizes and rotates query and key heads, and stores keys and values in the rows' slots.

        qkv: [T, (Q + 2 K) D]; its query part is overwritten with the result, its key part may be. rope_table: float32
        [positions, D], cosines in the first half of a row, sines in the second.
        """

    def attend(self, qkv: Tensor, attention: AttentionSpec, rows: StepRows, kv_layer: Tensor, out: Tensor) -> None:
        """Causal attention of the query part of `qkv` over each sequence's stored keys and values: out [T, Q D]."""

    def silu_mul(self, gate_up: Tensor, out: Tensor) -> None:
        """`out = silu(gate) * up`: [T, 2 F] with gate first, [T, F]."""
