"""Token embedding: the reference lookup and the module of the executor.

Linear in the elements that are copied. The same table serves as the head of tied models, which `layers/linear.py`
multiplies. It does not know the vocabulary's text.
"""

from __future__ import annotations

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
