"""The shape of a KV block, which everybody who moves blocks must agree on. Plain data without torch.

A block holds the keys and values of its tokens for all layers of the stage, so that it moves in one copy. Does not know
who owns which block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from llmscale.errors import ConfigError
from llmscale.models.spec import ModelSpec

DEFAULT_BLOCK_TOKENS = 32
DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


@dataclass(frozen=True, slots=True)
class KvLayout:
    """Shape of one block; `dtype` by its name."""

    layers: int
    kv_heads: int
    head_dim: int
    block_tokens: int
    dtype: str

    @property
    def block_bytes(self) -> int:
        elements = 2 * self.layers * self.kv_heads * self.block_tokens * self.head_dim
        return elements * DTYPE_BYTES[self.dtype]

    def blocks_within(self, budget_bytes: int, max_sequence_tokens: int) -> int:
        """How many blocks fit a budget. Raises ConfigError if the longest sequence would not fit alone."""
        blocks = budget_bytes // self.block_bytes
        needed = -(-max_sequence_tokens // self.block_tokens)
        if blocks < needed:
            raise ConfigError(
                f"The KV budget of {budget_bytes:,} bytes holds {blocks:,} blocks of {self.block_tokens} tokens, but "
                f"one sequence of max_sequence_tokens = {max_sequence_tokens:,} needs {needed:,} "
                f"({needed * self.block_bytes:,} bytes). Raise the budget or lower max_sequence_tokens."
            )
        return blocks


class BlockMemory(Protocol):
    """Memory of blocks of one layout."""

    @property
    def layout(self) -> KvLayout: ...
    @property
    def blocks(self) -> int: ...
    @property
    def memory(self) -> tuple[int, int]:
        """Address and bytes of all of it, on whatever device."""


def kv_layout_of(spec: ModelSpec, dtype: str, block_tokens: int = DEFAULT_BLOCK_TOKENS) -> KvLayout:
    """The layout for all layers of a model, which must be of one shape."""
    shapes = {(block.attention.kv_heads, block.attention.head_dim) for block in spec.blocks}
    assert len(shapes) == 1, f"one region per layer group: {shapes}"
    kv_heads, head_dim = shapes.pop()
    return KvLayout(len(spec.blocks), kv_heads, head_dim, block_tokens, dtype)
