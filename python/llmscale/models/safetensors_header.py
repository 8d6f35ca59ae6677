"""Reads and proves the header of one safetensors file before any library maps the file.

Format: 8 bytes little-endian header length, a JSON object {name: {dtype, shape, data_offsets}}, then the data, to
which the offsets refer. A header is accepted only if its tensors cover the data exactly, without hole or overlap, each
as long as its dtype and shape say, and the file ends where they end. Costs O(n log n) in the number of tensors. It does
not know which tensors a model needs. Source: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from math import prod
from pathlib import Path

from llmscale.errors import InvalidCheckpoint
from llmscale.models.folder import parse_json_object

MAX_HEADER_BYTES = 100_000_000
"""The format's own limit."""
MAX_DIMENSIONS = 8
LENGTH_BYTES = 8
METADATA_KEY = "__metadata__"

DTYPE_BITS: dict[str, int] = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "U16": 16,
    "I16": 16,
    "F16": 16,
    "BF16": 16,
    "U32": 32,
    "I32": 32,
    "F32": 32,
    "U64": 64,
    "I64": 64,
    "F64": 64,
}
"""The dtypes whose size is known here; others (sub-byte ones among them) are refused by name."""


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a file. `begin` and `end` are byte offsets from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    begin: int
    end: int


def read_header(path: Path, shown_name: str) -> list[TensorEntry]:
    """The tensors of a safetensors file in the order of their data. `shown_name` names the file in errors.

    Raises InvalidCheckpoint if anything about the header or the file's size does not fit.
    """
    with path.open("rb") as file:
        file_bytes = os.fstat(file.fileno()).st_size
        prefix = file.read(LENGTH_BYTES)
        if len(prefix) < LENGTH_BYTES:
            raise _invalid(shown_name, f"is {file_bytes} bytes long, shorter than the length of its header")
        header_bytes = int.from_bytes(prefix, "little")
        if header_bytes > MAX_HEADER_BYTES:
            raise _invalid(shown_name, f"has a header of {header_bytes:,} bytes, the limit is {MAX_HEADER_BYTES:,}")
        if LENGTH_BYTES + header_bytes > file_bytes:
            raise _invalid(shown_name, f"is truncated: {file_bytes:,} bytes, but its header alone ends at "
                           f"{LENGTH_BYTES + header_bytes:,}")  # fmt: skip
        header = file.read(header_bytes)
    if not header.startswith(b"{"):
        raise _invalid(shown_name, "does not begin with a JSON object; it is not a safetensors file")
    fields = parse_json_object(header, shown_name)
    data_begin = LENGTH_BYTES + header_bytes
    entries = [_entry(name, value, shown_name, data_begin) for name, value in fields.items() if name != METADATA_KEY]
    entries.sort(key=lambda entry: (entry.begin, entry.end))
    _check_cover(entries, shown_name, data_begin, file_bytes)
    return entries


def _check_cover(entries: list[TensorEntry], shown_name: str, data_begin: int, file_bytes: int) -> None:
    position = data_begin
    for entry in entries:
        if entry.begin != position:
            kind = "overlaps the one before" if entry.begin < position else "leaves a hole before it"
            raise _invalid(shown_name, f"tensor {entry.name!r} {kind}: it begins at byte {entry.begin - data_begin:,} "
                           f"of the data, expected {position - data_begin:,}")  # fmt: skip
        position = entry.end
    if position != file_bytes:
        kind = "is truncated" if file_bytes < position else "has bytes after its last tensor"
        raise _invalid(shown_name, f"{kind}: {file_bytes:,} bytes, its header describes {position:,}")


def _entry(name: str, value: object, shown_name: str, data_begin: int) -> TensorEntry:
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise _invalid(shown_name, f"tensor {name!r} is not described by dtype, shape and data_offsets")
    dtype = value["dtype"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise _invalid(shown_name, f"tensor {name!r} has dtype {str(dtype)[:40]!r}, known are {', '.join(DTYPE_BITS)}")
    shape = _integers(value["shape"], MAX_DIMENSIONS)
    offsets = _integers(value["data_offsets"], 2)
    if shape is None or offsets is None or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _invalid(shown_name, f"tensor {name!r} has an impossible shape or data_offsets")
    # Python's integers do not wrap, so a giant shape cannot pass as a small size.
    size_bytes = prod(shape) * DTYPE_BITS[dtype] // 8
    if offsets[1] - offsets[0] != size_bytes:
        raise _invalid(shown_name, f"tensor {name!r} has {offsets[1] - offsets[0]:,} bytes, but {dtype} of shape "
                       f"{list(shape)} needs {size_bytes:,}")  # fmt: skip
    return TensorEntry(name, dtype, shape, shown_name, data_begin + offsets[0], data_begin + offsets[1])


def _integers(value: object, max_length: int) -> tuple[int, ...] | None:
    if not isinstance(value, list) or len(value) > max_length:
        return None
    # 2**63 bounds each factor, so that the product of eight stays cheap to compute.
    if not all(isinstance(item, int) and not isinstance(item, bool) and 0 <= item < 1 << 63 for item in value):
        return None
    return tuple(value)


def _invalid(shown_name: str, reason: str) -> InvalidCheckpoint:
    return InvalidCheckpoint(
        f"{shown_name!r} {reason}. Download it again or convert it anew with the safetensors library."
    )
