"""The shape of a KV block, which everybody who moves blocks must agree on. Plain data without torch.

A block holds the keys and values of its tokens for all layers of the stage, so that it moves in one copy. Does not know
who owns which block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from llmscale import machine
from llmscale.errors import ConfigError
from llmscale.models.kv_rows import row_bytes
from llmscale.models.spec import ModelSpec

DEFAULT_BLOCK_TOKENS = 32


@dataclass(frozen=True, slots=True)
class KvLayout:
    """Shape of one block; `dtype`, of its rows, by its name."""

    layers: int
    kv_heads: int
    head_dim: int
    block_tokens: int
    dtype: str

    @property
    def block_bytes(self) -> int:
        rows = 2 * self.layers * self.kv_heads * self.block_tokens
        return rows * row_bytes(self.head_dim, self.dtype)

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


def require_room(region_bytes: int) -> None:
    """Raises MemoryError where a KV region has no room now.

    Pages of a region are taken as blocks are first written, so that an idle server holds none, and what a container may
    use is not asked for until it is needed. That ends nobody later: the plan gives all replicas of a host a quarter
    of what the machine or its container has, unless somebody says otherwise, and what somebody says is refused here, at
    the start, if it is not there. Scheduling promises no more blocks than a region has. Whoever takes the memory of a
    running server from outside of its container takes it from its weights and its requests all the same.
    """
    free = machine.free_bytes()
    if region_bytes > free:
        raise MemoryError(
            f"the KV cache is to have {region_bytes:,} bytes, and {free:,} are free; lower kv_cache_bytes (and"
            " --max-model-len, a sequence of which it must hold), or end what takes the memory"
        )


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
