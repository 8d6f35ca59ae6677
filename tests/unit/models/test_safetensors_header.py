"""Safetensors headers: every lie about the data is found before a library maps the file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from llmscale.errors import InvalidCheckpoint
from llmscale.models.safetensors_header import read_header


def write(path: Path, header: object, data: bytes, header_bytes: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    length = len(text) if header_bytes is None else header_bytes
    path.write_bytes(length.to_bytes(8, "little") + text + data)
    return path


def tensor(begin: int, end: int, shape: list[object] | None = None, dtype: object = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": [(end - begin) // 4] if shape is None else shape, "data_offsets": [begin, end]}


def test_a_file_of_the_library_is_read_with_its_metadata(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    tensors = {"b": torch.arange(6.0).reshape(2, 3), "a": torch.zeros(3, dtype=torch.bfloat16), "s": torch.tensor(1.0)}
    save_file(tensors, path, metadata={"format": "pt"})
    entries = {entry.name: entry for entry in read_header(path, path.name)}
    assert set(entries) == {"a", "b", "s"}
    assert (entries["b"].dtype, entries["b"].shape) == ("F32", (2, 3))
    assert (entries["a"].dtype, entries["a"].shape) == ("BF16", (3,))
    assert entries["s"].shape == ()
    data = path.read_bytes()[entries["b"].begin : entries["b"].end]
    assert torch.frombuffer(bytearray(data), dtype=torch.float32).tolist() == list(range(6))


GOOD = {"a": tensor(0, 8), "b": tensor(8, 20)}


@pytest.mark.parametrize(
    ("header", "data_bytes", "message"),
    [
        (GOOD, 19, "is truncated: "),
        (GOOD, 21, "has bytes after its last tensor"),
        ({"a": tensor(0, 8), "b": tensor(12, 20)}, 20, "'b' leaves a hole before it: it begins at byte 12"),
        ({"a": tensor(4, 8)}, 8, "leaves a hole"),
        ({"a": tensor(0, 8), "b": tensor(4, 20)}, 20, "'b' overlaps the one before"),
        ({"a": tensor(0, 8), "b": tensor(0, 8)}, 8, "overlaps"),
        ({"a": tensor(0, 8, [3])}, 8, "has 8 bytes, but F32 of shape \\[3\\] needs 12"),
        ({"a": tensor(0, 8, [1 << 62, 8])}, 8, "needs 147,573,952,589,676,412,928"),
        ({"a": tensor(0, 0, [1 << 32, 1 << 32])}, 0, "needs 73,786,976,294,838,206,464"),
        ({"a": tensor(0, 8, [1 << 63])}, 8, "impossible shape"),
        ({"a": tensor(0, 8, [-2])}, 8, "impossible shape"),
        ({"a": tensor(0, 8, [2.0])}, 8, "impossible shape"),
        ({"a": tensor(0, 8, [True, 2])}, 8, "impossible shape"),
        ({"a": tensor(0, 8, [1] * 9)}, 8, "impossible shape"),
        ({"a": tensor(8, 0, [2])}, 8, "impossible shape or data_offsets"),
        ({"a": tensor(0, 8, dtype="F33")}, 8, "dtype 'F33'"),
        ({"a": tensor(0, 8, dtype=["F32"])}, 8, "dtype"),
        ({"a": {**tensor(0, 8), "extra": 1}}, 8, "not described by dtype, shape and data_offsets"),
        ({"a": [0, 8]}, 8, "not described by"),
        (b'{"a": 1, "a": 1}', 0, "key 'a' appears twice"),
        (b"[]", 0, "does not begin with a JSON object"),
        (b"{", 0, "is not valid JSON"),
        (b'{"a": ' + b"[" * 50_000 + b"}", 0, "is not valid JSON"),
    ],
)
def test_a_header_that_does_not_fit_its_data_is_refused(
    tmp_path: Path, header: object, data_bytes: int, message: str
) -> None:
    path = write(tmp_path / "model.safetensors", header, b"\0" * data_bytes)
    with pytest.raises(InvalidCheckpoint, match=message):
        read_header(path, path.name)


@pytest.mark.parametrize(
    ("header_bytes", "message"),
    [(10_000, "is truncated"), (100_000_001, "the limit is 100,000,000"), (2**64 - 1, "the limit is 100,000,000")],
)
def test_a_header_longer_than_the_file_or_the_limit_is_not_read(
    tmp_path: Path, header_bytes: int, message: str
) -> None:
    path = write(tmp_path / "model.safetensors", GOOD, b"\0" * 20, header_bytes)
    with pytest.raises(InvalidCheckpoint, match=message):
        read_header(path, path.name)


def test_a_file_shorter_than_a_length_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"\0" * 7)
    with pytest.raises(InvalidCheckpoint, match="7 bytes long"):
        read_header(path, path.name)


@given(edits=st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=4))
def test_flipped_bytes_never_pass_with_tensors_outside_the_file(
    tmp_path_factory: pytest.TempPathFactory, edits: list[tuple[int, int]]
) -> None:
    """Any damage is either refused by name or leaves tensors that tile the data, as before."""
    path = tmp_path_factory.mktemp("fuzz") / "model.safetensors"
    write(path, {"__metadata__": {"format": "pt"}, **GOOD, "c": tensor(20, 52, [2, 4])}, bytes(52))
    content = bytearray(path.read_bytes())
    for position, value in edits:
        content[position % len(content)] = value
    path.write_bytes(content)
    try:
        entries = read_header(path, path.name)
    except InvalidCheckpoint:
        return
    ends = [entry.end for entry in entries]
    header_end = 8 + int.from_bytes(content[:8], "little")
    assert [entry.begin for entry in entries] == [header_end, *ends[:-1]]
    assert ends[-1] == len(content)
