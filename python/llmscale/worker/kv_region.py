"""The KV region of a worker: one contiguous tensor `[blocks, layers, 2, kv_heads, block_tokens, head_dim]`.

A block holds the keys and values of its tokens for all layers of the stage, so that it moves in one copy. The region is
sized from a byte budget. On a processor its pages come, as zeros, when blocks are first written: see `require_room` for
why that is safe. No kernel can meet a NaN in a slot that was never filled. Does not know who owns which block.
"""

from __future__ import annotations

import contextlib
import mmap

import torch
from torch import Tensor

from llmscale.layers.ops import KvLayer
from llmscale.models.spec import ModelSpec
from llmscale.worker.kv_layout import DEFAULT_BLOCK_TOKENS, KvLayout, kv_layout_of, require_room


def kv_layout(spec: ModelSpec, dtype: torch.dtype, block_tokens: int = DEFAULT_BLOCK_TOKENS) -> KvLayout:
    """The layout for all layers of a model, which must be of one shape."""
    return kv_layout_of(spec, str(dtype).removeprefix("torch."), block_tokens)


class KvRegion:
    """Owns the memory of `blocks` blocks."""

    __slots__ = ("blocks", "layout", "tensor")

    def __init__(self, layout: KvLayout, blocks: int, device: torch.device | None = None) -> None:
        assert blocks > 0
        shape = (blocks, layout.layers, 2, layout.kv_heads, layout.block_tokens, layout.head_dim)
        self.layout = layout
        self.blocks = blocks
        dtype = getattr(torch, layout.dtype)
        if device is None or device.type == "cpu":
            memory = _zeroed_memory(blocks * layout.block_bytes)
            self.tensor: Tensor = torch.frombuffer(memory, dtype=dtype).view(shape)
        else:
            self.tensor = torch.zeros(shape, dtype=dtype, device=device)

    @property
    def memory(self) -> tuple[int, int]:
        """See `BlockMemory`."""
        return self.tensor.data_ptr(), self.tensor.nbytes

    def layer(self, layer: int) -> KvLayer:
        """One layer of the region, as operations take it."""
        assert 0 <= layer < self.layout.layers, (layer, self.layout.layers)
        return KvLayer(self.tensor, layer)


def _zeroed_memory(size: int) -> mmap.mmap:
    """Address space whose pages the kernel zeroes when they are touched, huge ones where it has them. Raises
    MemoryError."""
    require_room(size)
    try:
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"{size:,} bytes for the KV region cannot be had: {error}") from error
    # A kernel without huge pages keeps small ones.
    with contextlib.suppress(OSError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory
