"""Token embedding: the reference lookup and the module of the executor.

Linear in the elements that are copied. Ranks that hold a part of the table each contribute rows or zeros to a sum. The
same table serves as the head of tied models, which `layers/linear.py`
multiplies. It does not know the vocabulary's text.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from llmscale.layers.ops import Ops


def embed(token_ids: Tensor, table: Tensor) -> Tensor:
    """Rows of `table` [V, H] by id: int32 [T] to [T, H]. An id outside the vocabulary raises IndexError."""
    return table.index_select(0, token_ids)


class Embedding:
    """The table [V, H]."""

    __slots__ = ("table",)

    def __init__(self, table: Tensor) -> None:
        self.table = table

    def __call__(self, ops: Ops, token_ids: Tensor, out: Tensor) -> None:
        """out[t] = table[token_ids[t]]: int32 [T], [T, H]."""
        ops.embed(token_ids, self.table, out)


class ShardedEmbedding:
    """A rank's rows of the table, [V_local, H], from `first_id` on; `add_up` sums over the ranks that hold the rest."""

    __slots__ = ("_add_up", "_first_id", "table")

    def __init__(self, table: Tensor, first_id: int, add_up: Callable[[Tensor], Tensor]) -> None:
        self.table = table
        self._first_id = first_id
        self._add_up = add_up

    def __call__(self, ops: Ops, token_ids: Tensor, out: Tensor) -> None:
        """out[t] = table[token_ids[t]] of the whole table: int32 [T], [T, H]."""
        local = token_ids - self._first_id
        elsewhere = (local < 0) | (local >= self.table.shape[0])
        ops.embed(local.masked_fill_(elsewhere, 0), self.table, out)
        # Exactly one rank adds something else than zero, so the sum is exact.
        out.masked_fill_(elsewhere[:, None], 0)
        out.copy_(self._add_up(out))
