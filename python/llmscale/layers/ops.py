"""The elementwise and attention operations of a decoder, as one interface with interchangeable implementations.

`ReferenceOps` (torch, the oracle) and native implementations do the same arithmetic: float32 inside, rounded to the
dtype of the output. Every operation writes into memory that the caller owns, so that a step allocates nothing. Matrix
products are not here; see `layers/linear.py`. It does not know models, engines, or who schedules.
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


class RopeTable:
    """Cosines and sines of the rotation by position, float32 `[positions, D / 2]` each, contiguous."""

    __slots__ = ("cosines", "sines")

    def __init__(self, cosines: Tensor, sines: Tensor) -> None:
        self.cosines = cosines
        self.sines = sines


class HeadNorms:
    """The weights `[D]` of the RMS norms on query and key heads, and their epsilon."""

    __slots__ = ("epsilon", "key", "query")

    def __init__(self, query: Tensor, key: Tensor, epsilon: float) -> None:
        self.query = query
        self.key = key
        self.epsilon = epsilon


class AttentionConstants:
    """What one attention layer holds for all steps: its spec, the norms on its heads if it has any, its rotation."""

    __slots__ = ("norms", "rope", "spec")

    def __init__(self, spec: AttentionSpec, norms: HeadNorms | None, rope: RopeTable) -> None:
        self.spec = spec
        self.norms = norms
        self.rope = rope


class KvLayer:
    """One layer of the KV region `[blocks, layers, 2, K, block_tokens, D]`."""

    __slots__ = ("layer", "region")

    def __init__(self, region: Tensor, layer: int) -> None:
        self.region = region
        self.layer = layer

    def view(self) -> Tensor:
        """[blocks, 2, K, block_tokens, D], dense but for the first axis."""
        return self.region[:, self.layer]


class Ops(Protocol):
    """Shapes: T rows, H hidden size, V vocabulary, F inner size, Q query and K key-value heads of D elements.

    The KV region holds keys first, in the dtype of the activations. All tensors are contiguous. An implementation runs
    one step at a time.
    """

    def begin_step(self, rows: StepRows) -> None:
        """Takes the rows that `rotate_and_store` and `attend` work on until the next call.

        What holds for all layers is checked and divided here once, not once per layer.
        """

    def embed(self, token_ids: Tensor, table: Tensor, out: Tensor) -> None:
        """`out[t] = table[token_ids[t]]`: int32 [T], [V, H], [T, H]."""

    def rms_norm(self, x: Tensor, weight: Tensor, epsilon: float, out: Tensor) -> None:
        """`out = x / sqrt(mean(x^2) + epsilon) * weight` over the last axis: [T, H], [H], [T, H]."""

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, epsilon: float, out: Tensor) -> None:
        """`residual += x`, rounded to its dtype; then `out = rms_norm(residual)`: [T, H] each."""

    def rotate_and_store(self, qkv: Tensor, attention: AttentionConstants, kv: KvLayer, query: Tensor) -> None:
        """Normalizes and rotates query and key heads of qkv [T, (Q + 2 K) D].

        The query heads go to `query` [T, Q D], keys and values to the slots of their rows.
        """

    def attend(self, query: Tensor, attention: AttentionConstants, kv: KvLayer, out: Tensor) -> None:
        """Causal attention over each sequence's keys and values, within the window if there is one: [T, Q D] both."""

    def silu_mul(self, gate_up: Tensor, out: Tensor) -> None:
        """`out = silu(gate) * up`: [T, 2 F] with gate first, [T, F]."""
