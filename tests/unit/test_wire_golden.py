"""The bytes of the wire protocol, read by an implementation that shares no code with the native codec.

Every golden frame is decoded with msgpack and compared with the structure in JSON beside it; the structure is compared
with the tables of docs/wire.md, field by field and type by type; and msgpack writes the structure to the same bytes.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import msgpack  # type: ignore[import-untyped]
import msgspec
import pytest

from llmscale.client import wire

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests/golden/wire/v1"
NAMES = sorted(path.stem for path in GOLDEN.glob("*.msgpack"))
PAGE = (ROOT / "docs/wire.md").read_text()
PRIMITIVES = {"u8": (int, 1 << 8), "u32": (int, 1 << 32), "u64": (int, 1 << 64)}

Rows = list[list[str]]


def tables(level: str) -> dict[str, Rows]:
    """The first table under every heading of a level, as rows of cells."""
    found = {}
    for section in re.split(rf"(?m)^{level} ", PAGE)[1:]:
        title, _, text = section.partition("\n")
        text = re.split(r"(?m)^#", text)[0]
        lines = [line for line in text.splitlines() if line.startswith("|")]
        found[title] = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    return found


RECORDS = tables("###")
DIRECTIONS = {
    match[1]: rows for title, rows in tables("##").items() if (match := re.search(r"\(`(\w+)`\)", title)) is not None
}


def load(name: str) -> tuple[bytes, dict[str, Any]]:
    return (GOLDEN / f"{name}.msgpack").read_bytes(), json.loads((GOLDEN / f"{name}.json").read_text())


def flat(value: Any) -> Any:
    """The structure as it stands on the wire: records become arrays of their fields."""
    if isinstance(value, dict):
        return bytes.fromhex(value["$bytes"]) if "$bytes" in value else [flat(field) for field in value.values()]
    return [flat(item) for item in value] if isinstance(value, list) else value


def check(value: Any, kind: str) -> None:
    """Compares a value of a structure with its documented type."""
    if kind.endswith("?"):
        if value is not None:
            check(value, kind[:-1])
    elif kind.startswith("["):
        assert isinstance(value, list)
        for item in value:
            check(item, kind[1:-1])
    elif kind.startswith("("):
        first, second = kind[1:-1].split(", ")
        assert len(value) == 2
        check(value[0], first)
        check(value[1], second)
    elif kind in PRIMITIVES:
        python, bound = PRIMITIVES[kind]
        assert type(value) is python
        assert 0 <= value < bound
    elif kind in {"f32", "bool", "text"}:
        assert type(value) is {"f32": float, "bool": bool, "text": str}[kind]
    elif kind == "bytes32":
        assert len(bytes.fromhex(value["$bytes"])) == 32
    else:
        check_named(value, RECORDS[kind])


def check_named(value: Any, rows: Rows) -> None:
    if not isinstance(value, dict):
        assert str(value) in [row[0] for row in rows], "a code that is not in its table"
    elif rows[0][0] == "0":
        (fields,) = [row[2] for row in rows if row[0] == str(value["code"])]
        documented = [part.split()[:2] for part in fields.split(", ") if part]
        assert list(value) == ["code", *(name for name, _ in documented)]
        for name, kind in documented:
            check(value[name], kind)
    else:
        assert list(value) == [row[0] for row in rows]
        for name, kind, _ in rows:
            check(value[name], kind)


@pytest.mark.parametrize("name", NAMES)
def test_msgpack_reads_a_frame_as_the_structure_beside_it(name: str) -> None:
    frame, structure = load(name)
    expected = [structure["version"], structure["tag"], flat(structure["body"])]
    assert msgpack.unpackb(frame, use_list=True) == expected


@pytest.mark.parametrize("name", NAMES)
def test_msgpack_writes_the_structure_to_the_same_bytes(name: str) -> None:
    frame, structure = load(name)
    body = [structure["version"], structure["tag"], flat(structure["body"])]
    assert msgpack.packb(body, use_single_float=True) == frame


@pytest.mark.parametrize("name", NAMES)
def test_the_structure_is_what_the_page_documents(name: str) -> None:
    _, structure = load(name)
    rows = DIRECTIONS[name.partition(".")[0]]
    (record,) = [row[2] for row in rows if row[:2] == [str(structure["tag"]), structure["message"]]]
    if record:
        check(structure["body"], record)
    else:
        assert structure["body"] == {}


def test_every_documented_message_has_golden_bytes() -> None:
    documented = {(direction, row[1]) for direction, rows in DIRECTIONS.items() for row in rows}
    kept = {(name.partition(".")[0], load(name)[1]["message"]) for name in NAMES}
    assert documented == kept
    assert len(documented) == 23


def test_every_structure_has_its_bytes() -> None:
    assert sorted(path.stem for path in GOLDEN.glob("*.json")) == NAMES


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("from_node.")])
def test_the_client_reads_every_frame_of_a_node(name: str) -> None:
    frame, structure = load(name)
    assert msgspec.msgpack.encode(wire.decode(frame)) == msgspec.msgpack.encode(flat(structure["body"]))


def test_the_annotated_example_is_the_golden_frame() -> None:
    example = PAGE.rpartition("## An example")[2]
    name = re.search(r"v1/(\S+)\.msgpack", example)
    assert name is not None
    block = example.split("```")[1]
    # Bytes stand left of the first run of two spaces that follows them.
    matches = [re.match(r"\s*((?:[0-9a-f]{2} ?)*)", line) for line in block.splitlines() if line.strip()]
    digits = "".join(match[1] for match in matches if match is not None)
    assert bytes.fromhex(digits) == load(name[1])[0]
