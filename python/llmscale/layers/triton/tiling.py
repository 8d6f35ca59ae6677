"""How attention is cut into programs: tiles that fit a multiprocessor's shared memory, parts that fill all of them.

Pure functions of the model's shape and the device's; nothing depends on the lengths in a step, so that a captured graph
stays valid. Sizes of parts are chosen for a device that copies at a few terabytes per second: about three programs
per multiprocessor. Constant time. It does not know kernels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from llmscale.layers.triton.launch import blocks_of, padded

PROGRAMS_PER_PROCESSOR = 3
MAX_PARTS = 64
MIN_PART_TOKENS = 256
"""A part below this takes less time than merging it costs."""
RESERVED_SHARED_BYTES = 1024
"""What the runtime takes of every program's shared memory."""


@dataclass(frozen=True, slots=True)
class DeviceShape:
    """Multiprocessors, and the shared memory that one program may have."""

    processors: int
    max_shared_bytes: int

    @staticmethod
    def of(device: torch.device) -> DeviceShape:
        """Asks the driver. The CPU, where only the interpreter runs kernels, counts as one small device."""
        if device.type == "cpu":
            return DeviceShape(processors=8, max_shared_bytes=99 * 1024)
        found = torch.cuda.get_device_properties(device)
        return DeviceShape(found.multi_processor_count, found.shared_memory_per_block_optin)


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """What tiles depend on of a model's attention."""

    query_heads: int
    kv_heads: int
    head_dim: int
    element_bytes: int

    @property
    def key_bytes(self) -> int:
        """One key or value in a tile, the padding to a power of two included."""
        return padded(self.head_dim) * self.element_bytes


@dataclass(frozen=True, slots=True)
class DecodeTiling:
    """Keys in a tile, and into how many parts a context is cut at most."""

    tile: int
    warps: int
    stages: int
    min_part_tiles: int
    max_parts: int
    programs: int
    """how many programs fill the device, divided by those of one sequence"""

    def parts(self, sequences: int) -> int:
        """Parts of each context when `sequences` share the device: a power of two."""
        assert sequences > 0
        wanted = self.programs // sequences
        return 1 if wanted < 2 else min(self.max_parts, 1 << (wanted.bit_length() - 1))


@dataclass(frozen=True, slots=True)
class ChunkTiling:
    """Lines (rows times query heads of a group) and keys in a tile."""

    lines: int
    tile: int
    warps: int
    stages: int


def decode_tiling(shape: AttentionShape, device: DeviceShape, max_sequence_tokens: int) -> DecodeTiling:
    """Tiles that fit a multiprocessor twice at least, so that one program loads while another computes."""
    room = (device.max_shared_bytes - RESERVED_SHARED_BYTES) // 2
    # Larger ones spill registers (seen in cubins of all four architectures).
    max_tile = 64 if shape.key_bytes <= 256 else 32
    if shape.element_bytes == 4:
        max_tile //= 2
    tile, stages = _fitting(shape, room, fixed_bytes=0, max_tile=max_tile)
    min_part_tiles = max(1, MIN_PART_TOKENS // tile)
    useful = blocks_of(max_sequence_tokens, min_part_tiles * tile)
    return DecodeTiling(
        tile=tile,
        warps=4,
        stages=stages,
        min_part_tiles=min_part_tiles,
        max_parts=min(MAX_PARTS, padded(useful)),
        programs=max(1, PROGRAMS_PER_PROCESSOR * device.processors // shape.kv_heads),
    )


def chunk_tiling(shape: AttentionShape, device: DeviceShape) -> ChunkTiling:
    """Tiles of 128 lines where queries, keys and values fit, else of 64, and at least one row of the group.

    Products in float32 take no tensor core and hold everything in registers: 32 lines spill 600 bytes, 16 none.
    """
    room = device.max_shared_bytes - RESERVED_SHARED_BYTES
    lines = 128 if 128 * shape.key_bytes * 4 <= room else 64
    if shape.element_bytes == 4:
        lines = 16
    lines = max(lines, padded(shape.query_heads // shape.kv_heads))
    max_tile = 64 if lines >= 128 or shape.key_bytes <= 128 else 32
    tile, stages = _fitting(shape, room, fixed_bytes=lines * shape.key_bytes, max_tile=max_tile)
    return ChunkTiling(lines=lines, tile=tile, warps=8 if lines >= 128 else 4, stages=stages)


def _fitting(shape: AttentionShape, room: int, fixed_bytes: int, max_tile: int) -> tuple[int, int]:
    """The largest tile of keys and values, and its stages, that fit `room` bytes.

    A key is loaded by the number of its block, which is loaded first. Triton deals its stages to such a chain: with
    five, two tiles are on their way while one is computed with, with three, one is (seen in cubins of Triton 3.9).
    """
    for tile, stages, tiles_held in ((64, 5, 2), (64, 3, 1), (32, 5, 2), (32, 3, 1), (16, 5, 2)):
        needed = fixed_bytes + 2 * tile * shape.key_bytes * tiles_held
        # An eighth for probabilities, block numbers and what the compiler keeps beside them.
        if tile <= max_tile and needed + needed // 8 <= room:
            return tile, stages
    return 16, 3
