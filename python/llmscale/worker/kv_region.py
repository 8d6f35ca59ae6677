"""The KV region of a worker: one contiguous tensor `[blocks, layers, 2, kv_heads, block_tokens, head_dim]`.

A block holds the keys and values of its tokens for all layers of the stage, so that it moves in one copy. The region is
sized from a byte budget and is all there, as zeros, when it is made: memory that is not there fails the start, not a
request hours later, and no kernel can meet a NaN in a slot that was never filled. Does not know who owns which block.
"""

from __future__ import annotations

import errno
import mmap

import torch
from torch import Tensor

from llmscale.layers.ops import KvLayer
from llmscale.models.spec import ModelSpec
from llmscale.worker.kv_layout import DEFAULT_BLOCK_TOKENS, KvLayout, kv_layout_of

_MADV_POPULATE_WRITE = 23


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
    """Pages that the kernel has zeroed and mapped, huge ones where it has them.

    384 MiB take 54 ms like this; written by torch they took 173 to 280 ms, most of the pause of a killed worker's
    streams. Raises MemoryError.
    """
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    _advise(memory, mmap.MADV_HUGEPAGE)
    if not _advise(memory, _MADV_POPULATE_WRITE):
        # Linux before 5.14: written like any memory.
        torch.frombuffer(memory, dtype=torch.uint8).zero_()
    return memory


def _advise(memory: mmap.mmap, advice: int) -> bool:
    """False if this kernel does not know the advice. Raises MemoryError."""
    try:
        memory.madvise(advice)
    except OSError as error:
        if error.errno == errno.EINVAL:
            return False
        raise MemoryError(f"{len(memory):,} bytes for the KV region cannot be had: {error}") from error
    return True
