"""Whether a checkpoint whose head is tied to its embedding, and that stores both tables, stores the same one twice.

Every executor takes one of the two, and so does whoever quantizes, so each asks here before. Reads both tables in
chunks, without torch: as fast as files are read where the bytes are the same, and numbers are looked at only in chunks
where they are not. It does not know who uses the tables.
"""

from __future__ import annotations

import struct
from array import array
from typing import BinaryIO

from llmscale.errors import InvalidCheckpoint
from llmscale.models.checkpoint import Checkpoint
from llmscale.models.safetensors_header import DTYPE_BITS, TensorEntry
from llmscale.models.spec import ModelSpec

CHUNK_ELEMENTS = 1 << 18
"""Chunks that stay in a cache: 263 MB twice take 0.09 s, four times that in chunks of 2 MiB."""


def refuse_different_tables(spec: ModelSpec, checkpoint: Checkpoint) -> None:
    """Raises InvalidCheckpoint where a tied checkpoint stores two tables that differ. `match_tensors` has passed it.

    Releases of transformers disagree on what two different tables mean (4 ties regardless, 5 does not tie), so neither
    is right.
    """
    tensors, own, tied = checkpoint.tensors, spec.embedding.parts[0].name, spec.head.tied_name
    if tied is None or own not in tensors or tied not in tensors:
        return
    embedding, head = tensors[own], tensors[tied]
    assert embedding.shape == head.shape, (embedding.shape, head.shape)
    elements = embedding.shape[0] * embedding.shape[1]
    with checkpoint.files[embedding.file].open("rb") as first, checkpoint.files[head.file].open("rb") as second:
        first.seek(embedding.begin)
        second.seek(head.begin)
        for start in range(0, elements, CHUNK_ELEMENTS):
            count = min(CHUNK_ELEMENTS, elements - start)
            if not _same(_read(first, embedding, count), embedding.dtype, _read(second, head, count), head.dtype):
                raise InvalidCheckpoint(
                    f"config.json ties the head to the embedding, but {head.name!r} and {embedding.name!r} differ. Set "
                    "tie_word_embeddings to false in config.json, or remove the one that is wrong."
                )


def _read(file: BinaryIO, entry: TensorEntry, count: int) -> bytes:
    size = count * DTYPE_BITS[entry.dtype] // 8
    content = file.read(size)
    if len(content) != size:
        raise InvalidCheckpoint(f"{entry.file!r} was cut off while it was read. Load it again.")
    return content


def _same(first: bytes, first_dtype: str, second: bytes, second_dtype: str) -> bool:
    if first_dtype == second_dtype and first == second:
        return True
    first, second = _float32(first, first_dtype), _float32(second, second_dtype)
    # Two zeros of different sign are the same number.
    return first == second or array("f", first) == array("f", second)


def _float32(content: bytes, dtype: str) -> bytes:
    """The same numbers as little-endian float32, which holds those of all dtypes that weights have."""
    if dtype == "F16":
        return struct.pack(f"<{len(content) // 2}f", *struct.unpack(f"<{len(content) // 2}e", content))
    if dtype == "F32":
        return content
    assert dtype == "BF16", dtype
    wide = bytearray(2 * len(content))
    wide[2::4], wide[3::4] = content[::2], content[1::2]
    return bytes(wide)
