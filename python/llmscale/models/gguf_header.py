"""Reads and proves the header of one GGUF file: its metadata, and where which tensor lies.

Every count is checked against what the file can still hold before anything is made of it, so that reading costs no more
than the header has bytes; tensors lie in the file, aligned, without overlap, in block types that are known. Versions 2
and 3, little-endian. It does not know models and reads no weights.
Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path

from llmscale.errors import InvalidCheckpoint, UnsupportedModel

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_HEADER_BYTES = 256 << 20
"""A vocabulary of 256k tokens with its merges takes about 12 MB."""
MAX_ENTRIES = 1 << 16
"""Of metadata, and of tensors."""
MAX_NAME_BYTES = 1 << 10
MAX_STRING_BYTES = 1 << 24
MAX_ELEMENTS = 1 << 24
"""Of an array in the metadata."""
MAX_DIMENSIONS = 4
MAX_TENSOR_ELEMENTS = 1 << 42
MAX_ALIGNMENT = 1 << 20
DEFAULT_ALIGNMENT = 32

Value = int | float | bool | str | list[int] | list[float] | list[bool] | list[str]

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""struct's letter by the format's number of a value type."""
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True, slots=True)
class BlockType:
    """How values are stored: so many of a row in a block of so many bytes."""

    name: str
    elements: int
    block_bytes: int


BLOCK_TYPES: dict[int, BlockType] = {
    0: BlockType("F32", 1, 4),
    1: BlockType("F16", 1, 2),
    2: BlockType("Q4_0", 32, 18),
    3: BlockType("Q4_1", 32, 20),
    6: BlockType("Q5_0", 32, 22),
    7: BlockType("Q5_1", 32, 24),
    8: BlockType("Q8_0", 32, 34),
    10: BlockType("Q2_K", 256, 84),
    11: BlockType("Q3_K", 256, 110),
    12: BlockType("Q4_K", 256, 144),
    13: BlockType("Q5_K", 256, 176),
    14: BlockType("Q6_K", 256, 210),
    20: BlockType("IQ4_NL", 32, 18),
    23: BlockType("IQ4_XS", 256, 136),
    30: BlockType("BF16", 1, 2),
}


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """A tensor: shape as torch has it, outermost first; bytes `begin` to `end` of the file."""

    name: str
    type: BlockType
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """What a file says before its data. `data_begin` is where the data starts."""

    metadata: dict[str, Value]
    tensors: dict[str, GgufTensor]
    data_begin: int


def read_gguf_header(path: Path) -> GgufHeader:
    """Raises InvalidCheckpoint for a file that is malformed or truncated, UnsupportedModel for a version, byte order or
    block type that is not implemented."""
    shown = path.name
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            if size < len(MAGIC) + 20:
                raise InvalidCheckpoint(f"{shown!r} has {size:,} bytes, too few for a GGUF header.")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _Reader(data, size, shown).header()
    except OSError as error:
        raise InvalidCheckpoint(f"{str(path)!r} cannot be read: {error.strerror}.") from error


class _Reader:
    """A place in a file that only moves forward."""

    def __init__(self, data: mmap.mmap, size: int, shown: str) -> None:
        self._data = data
        self._size = size
        self._limit = min(size, MAX_HEADER_BYTES)
        self._shown = shown
        self._at = 0

    def header(self) -> GgufHeader:
        """All of it, proved."""
        if self._bytes(len(MAGIC), "its first bytes") != MAGIC:
            raise InvalidCheckpoint(f"{self._shown!r} does not begin with GGUF; it is another kind of file.")
        version = self._number("I")
        if version not in VERSIONS:
            if version & 0xFFFF == 0:
                raise UnsupportedModel(f"{self._shown!r} is big-endian; convert it to little-endian.")
            raise UnsupportedModel(f"{self._shown!r} has GGUF version {version}, implemented are 2 and 3.")
        tensors, entries = self._count("tensors", 24), self._count("entries of metadata", 13)
        metadata: dict[str, Value] = {}
        for _ in range(entries):
            key = self._string(MAX_NAME_BYTES, "a name in the metadata")
            if key in metadata:
                raise self._bad(f"names {key[:80]!r} twice")
            metadata[key] = self._value(key)
        described = [self._tensor() for _ in range(tensors)]
        alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if isinstance(alignment, bool) or not isinstance(alignment, int) or not 1 <= alignment <= MAX_ALIGNMENT:
            raise self._bad(f"has alignment {str(alignment)[:40]}, expected 1 to {MAX_ALIGNMENT:,}")
        if alignment & (alignment - 1) != 0:
            raise self._bad(f"has alignment {alignment}, expected a power of two")
        data_begin = -(-self._at // alignment) * alignment
        return GgufHeader(metadata, self._placed(described, data_begin, alignment), data_begin)

    def _tensor(self) -> tuple[str, BlockType, tuple[int, ...], int]:
        name = self._string(MAX_NAME_BYTES, "a tensor's name")
        dimensions = self._number("I")
        if not 1 <= dimensions <= MAX_DIMENSIONS:
            raise self._bad(f"gives {name[:80]!r} {dimensions:,} dimensions, expected 1 to {MAX_DIMENSIONS}")
        # The format's first dimension is the innermost one.
        shape = tuple(reversed([self._number("Q") for _ in range(dimensions)]))
        if 0 in shape or prod(shape) > MAX_TENSOR_ELEMENTS:
            raise self._bad(f"gives {name[:80]!r} shape {list(shape)}, expected 1 to {MAX_TENSOR_ELEMENTS:,} elements")
        kind = self._number("I")
        if kind not in BLOCK_TYPES:
            known = ", ".join(block.name for block in BLOCK_TYPES.values())
            raise UnsupportedModel(f"{self._shown!r} stores {name[:80]!r} as type {kind}; implemented are {known}.")
        if shape[-1] % BLOCK_TYPES[kind].elements != 0:
            block = BLOCK_TYPES[kind]
            raise self._bad(
                f"stores rows of {shape[-1]:,} in {name[:80]!r} as {block.name}, blocks of {block.elements}"
            )
        return name, BLOCK_TYPES[kind], shape, self._number("Q")

    def _placed(
        self, described: list[tuple[str, BlockType, tuple[int, ...], int]], data_begin: int, alignment: int
    ) -> dict[str, GgufTensor]:
        found: dict[str, GgufTensor] = {}
        end_before = data_begin
        for name, kind, shape, offset in sorted(described, key=lambda entry: entry[3]):
            begin = data_begin + offset
            end = begin + prod(shape) // kind.elements * kind.block_bytes
            if name in found:
                raise self._bad(f"has {name[:80]!r} twice")
            if offset % alignment != 0 or begin < end_before or end > self._size:
                raise self._bad(
                    f"says that {name[:80]!r} lies at bytes {begin:,} to {end:,}; the file has {self._size:,}, tensors"
                    f" begin at multiples of {alignment} and do not overlap, the one before ends at {end_before:,}"
                )
            found[name] = GgufTensor(name, kind, shape, begin, end)
            end_before = end
        return found

    def _value(self, key: str) -> Value:
        kind = self._number("I")
        if kind == _STRING:
            return self._string(MAX_STRING_BYTES, key)
        if kind in _SCALARS:
            return self._scalar(_SCALARS[kind])
        if kind != _ARRAY:
            raise self._bad(f"gives {key[:80]!r} a value of type {kind}, which the format does not have")
        element = self._number("I")
        count = self._number("Q")
        if element not in _SCALARS and element != _STRING:
            raise self._bad(f"gives {key[:80]!r} an array of type {element}, expected numbers or strings")
        smallest = 8 if element == _STRING else struct.calcsize("<" + _SCALARS[element])
        if count > MAX_ELEMENTS or count * smallest > self._limit - self._at:
            raise self._bad(
                f"gives {key[:80]!r} {count:,} elements; the limit is {MAX_ELEMENTS:,}, and the header has"
                f" {self._limit - self._at:,} bytes left"
            )
        if element == _STRING:
            return [self._string(MAX_STRING_BYTES, key) for _ in range(count)]
        letter = _SCALARS[element]
        return list(struct.unpack(f"<{count}{letter}", self._bytes(count * smallest, key)))

    def _scalar(self, letter: str) -> int | float | bool:
        (value,) = struct.unpack("<" + letter, self._bytes(struct.calcsize("<" + letter), "a number"))
        assert isinstance(value, int | float)
        return value

    def _number(self, letter: str) -> int:
        value = self._scalar(letter)
        assert isinstance(value, int)
        return value

    def _count(self, what: str, smallest: int) -> int:
        """A number of things that take at least so many bytes each."""
        count = self._number("Q")
        if count > MAX_ENTRIES or count * smallest > self._size:
            raise self._bad(f"says that it has {count:,} {what}; the limit is {MAX_ENTRIES:,}, the file {self._size:,}")
        return count

    def _string(self, max_bytes: int, what: str) -> str:
        length = self._number("Q")
        if length > max_bytes:
            raise self._bad(f"has {length:,} bytes in {what[:80]!r}, the limit is {max_bytes:,}")
        try:
            return self._bytes(length, what).decode()
        except UnicodeDecodeError as error:
            raise self._bad(f"has {what[:80]!r}, which is not UTF-8") from error

    def _bytes(self, count: int, what: str) -> bytes:
        if count > self._limit - self._at:
            raise self._bad(
                f"ends within {what[:80]!r}: {count:,} bytes at {self._at:,}, but the header can have {self._limit:,}"
            )
        self._at += count
        return self._data[self._at - count : self._at]

    def _bad(self, said: str) -> InvalidCheckpoint:
        return InvalidCheckpoint(f"{self._shown!r} {said}. Download it again.")
