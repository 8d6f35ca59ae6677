"""Launches that move KV blocks between two regions by lists of indices, as they are or packed to e4m3.

A region is a contiguous tensor whose first axis counts blocks, on the device or in pinned memory, which a device
addresses as well. Lists of indices are int32 on the device and are bounds-checked where they are made. O(1) per launch;
the kernels are in `cuda/kernels/kv_copy.cu` and `kv_pack.cu`. Does not know who owns a block.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmscale.cuda.launch import Argument, Launch, Launcher, int32s

RING_SHARED_BYTES = 12 * 16_384 + 12 * 8
BULK_THREADS = 32
LOAD_THREADS = 512
PACK_THREADS = 256
PACK_SHARED_BYTES = PACK_THREADS // 32 * 4
E4M3_LARGEST = 448.0
SMALLEST_SCALE = 2.0**-96


@dataclass(frozen=True, slots=True)
class BlockList:
    """Block `sources[i]` goes to `targets[i]`: int32 tensors of one length, on the device."""

    sources: Tensor
    targets: Tensor

    @classmethod
    def of(
        cls,
        sources: Sequence[int],
        targets: Sequence[int],
        source_region: Tensor,
        target_region: Tensor,
        device: torch.device,
    ) -> BlockList:
        """Checks every index, and that no block is written twice: a kernel would corrupt what it must not touch."""
        assert len(sources) == len(targets), (len(sources), len(targets))
        assert all(0 <= block < source_region.shape[0] for block in sources), "a source block is outside of its region"
        assert all(0 <= block < target_region.shape[0] for block in targets), "a target block is outside of its region"
        assert len(set(targets)) == len(targets), "a block is the target of two copies"
        pinned = device.type == "cuda"
        both = torch.tensor([list(sources), list(targets)], dtype=torch.int32, pin_memory=pinned)
        there = both.to(device, non_blocking=True)
        return cls(there[0], there[1])

    def __len__(self) -> int:
        return int(self.sources.shape[0])


@dataclass(frozen=True, slots=True)
class PackedLayout:
    """A block of `slabs` (layers x 2 x heads) of `slab_elements` (tokens x dimensions), and its bytes as e4m3."""

    slabs: int
    slab_elements: int

    def __post_init__(self) -> None:
        assert self.slabs > 0, self.slabs
        assert self.slab_elements > 0, self.slab_elements
        assert self.slab_elements % 16 == 0, f"a slab of {self.slab_elements} elements is not a multiple of 16"

    @classmethod
    def of(cls, region: Tensor) -> PackedLayout:
        """Of a KV region `[blocks, layers, 2, heads, tokens, dimensions]`."""
        _, layers, two, heads, tokens, dimensions = region.shape
        return cls(layers * two * heads, tokens * dimensions)

    @property
    def packed_block_bytes(self) -> int:
        return -(-(self.slabs * self.slab_elements + 4 * self.slabs) // 16) * 16


def block_bytes(region: Tensor) -> int:
    """Of one block."""
    assert region.is_contiguous(), region.stride()
    return region[0].numel() * region.itemsize


def launch_copy(launcher: Launcher, source: Tensor, target: Tensor, blocks: BlockList, thread_blocks: int = 4) -> None:
    """Copies blocks on `thread_blocks` multiprocessors. Blocks have one size on both sides, a multiple of 16 bytes."""
    size = block_bytes(source)
    assert size == block_bytes(target), (size, block_bytes(target))
    assert size % 16 == 0, f"blocks of {size} bytes are not a multiple of 16"
    assert size < 2**31, size
    assert (source.data_ptr() | target.data_ptr()) % 16 == 0, "regions are aligned to 16 bytes"
    if len(blocks) == 0:
        return
    arguments: tuple[Argument, ...] = (source, target, blocks.sources, blocks.targets, *int32s(len(blocks), size))
    bulk = launcher.limits.has_bulk_copies and launcher.limits.max_shared_bytes >= RING_SHARED_BYTES
    kernel, threads, shared = (
        ("kv_copy_bulk", BULK_THREADS, RING_SHARED_BYTES) if bulk else ("kv_copy_loads", LOAD_THREADS, 0)
    )
    launcher.launch(Launch(kernel, (thread_blocks, 1, 1), threads, shared, arguments))


def launch_pack(launcher: Launcher, region: Tensor, packed: Tensor, blocks: BlockList, layout: PackedLayout) -> None:
    """bfloat16 blocks of a region to e4m3 blocks of `packed`, uint8 `[blocks, packed_block_bytes]`."""
    _check_packing(region, packed, layout)
    if len(blocks):
        launcher.launch(_packing("kv_pack_e4m3", launcher, region, packed, blocks, layout, PACK_SHARED_BYTES))


def launch_unpack(launcher: Launcher, packed: Tensor, region: Tensor, blocks: BlockList, layout: PackedLayout) -> None:
    """The way back: each element times its slab's scale, rounded to bfloat16."""
    _check_packing(region, packed, layout)
    if len(blocks):
        launcher.launch(_packing("kv_unpack_e4m3", launcher, packed, region, blocks, layout, 0))


def _packing(
    kernel: str,
    launcher: Launcher,
    source: Tensor,
    target: Tensor,
    blocks: BlockList,
    layout: PackedLayout,
    shared: int,
) -> Launch:
    sizes = int32s(len(blocks), layout.slabs, layout.slab_elements)
    lists = (source, target, blocks.sources, blocks.targets)
    arguments: tuple[Argument, ...] = (*lists, *sizes, ctypes.c_int64(layout.packed_block_bytes))
    grid = min(len(blocks) * layout.slabs, 2 * launcher.limits.multiprocessors)
    return Launch(kernel, (grid, 1, 1), PACK_THREADS, shared, arguments)


def _check_packing(region: Tensor, packed: Tensor, layout: PackedLayout) -> None:
    assert region.dtype == torch.bfloat16, region.dtype
    assert region.is_contiguous(), region.stride()
    assert region[0].numel() == layout.slabs * layout.slab_elements, (region.shape, layout)
    assert packed.dtype == torch.uint8, packed.dtype
    assert packed.is_contiguous(), packed.stride()
    assert packed.shape[1] == layout.packed_block_bytes, (packed.shape, layout)
    assert (region.data_ptr() | packed.data_ptr()) % 16 == 0, "regions are aligned to 16 bytes"


def packed_blocks(blocks: Tensor, layout: PackedLayout) -> Tensor:
    """The reference of `launch_pack`: bfloat16 `[n, ...]` to uint8 `[n, packed_block_bytes]`, bit for bit."""
    slabs = blocks.reshape(blocks.shape[0], layout.slabs, layout.slab_elements).float()
    magnitudes = slabs.abs().nan_to_num(nan=0.0, posinf=float("inf")).amax(-1)
    scales = (magnitudes / E4M3_LARGEST).clamp_min(SMALLEST_SCALE)
    scaled = slabs * (1.0 / scales)[..., None]
    # torch's conversion gives NaN above the largest number; saturation is ours.
    values = scaled.clamp(-E4M3_LARGEST, E4M3_LARGEST).to(torch.float8_e4m3fn)
    packed = torch.zeros(blocks.shape[0], layout.packed_block_bytes, dtype=torch.uint8, device=blocks.device)
    elements = layout.slabs * layout.slab_elements
    packed[:, :elements] = values.view(torch.uint8).reshape(blocks.shape[0], elements)
    packed[:, elements : elements + 4 * layout.slabs] = scales.contiguous().view(torch.uint8)
    return packed


def unpacked_blocks(packed: Tensor, layout: PackedLayout) -> Tensor:
    """The reference of `launch_unpack`: bfloat16 `[n, slabs, slab_elements]`."""
    elements = layout.slabs * layout.slab_elements
    values = packed[:, :elements].contiguous().view(torch.float8_e4m3fn).float()
    scales = packed[:, elements : elements + 4 * layout.slabs].contiguous().view(torch.float32)
    return (values.view(-1, layout.slabs, layout.slab_elements) * scales[..., None]).bfloat16()
