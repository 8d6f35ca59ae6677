"""A TOML text for people's eyes: what it says as structs, and on which line each entry stands, so that an error can
name file, line, name and value.

tomllib alone decides what the text means, in O(its size); the line of an entry costs two readings for each line that
has its name, and is looked for only when there is an error. Knows nothing of what the entries are for.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, TypeVar

import msgspec

from llmscale.errors import ConfigError

# Of the lines in which a name stands, and of the equals signs of one: whoever writes more is told the table's line.
_MAX_CANDIDATES: Final = 256
_MAX_SHOWN: Final = 80
Where = tuple[str, ...]
S = TypeVar("S", bound=msgspec.Struct)


class TomlDocument:
    """`path` is what errors name. Raises `ConfigError` for what is no TOML."""

    __slots__ = ("_lines", "path", "values")

    def __init__(self, text: str, path: Path) -> None:
        self.path = path
        # Line ends are those of TOML alone, so that numbers of lines are an editor's.
        self._lines = text.replace("\r\n", "\n").split("\n")
        try:
            self.values = tomllib.loads(text)
        except (ValueError, RecursionError) as error:
            # Not only TOMLDecodeError: a number of 5,000 digits and brackets 1,000 deep end otherwise.
            raise ConfigError(f"{path} is no TOML: {error}") from error

    def table(self, where: Where) -> dict[str, Any]:
        """The table at a place, empty if there is none."""
        found = _at(self.values, where)
        if found is None:
            return {}
        if not isinstance(found, dict):
            raise self.error(where, f"it must be a table: write [{'.'.join(where)}]")
        return found

    def struct(self, where: Where, kind: type[S]) -> S:
        """The table at a place as a struct."""
        table = self.table(where)
        self.check_names(where, kind)
        converted: S = self._convert(table, kind, where)
        return converted

    def value(self, where: Where, kind: type[msgspec.Struct], default: str) -> str:
        """A text that a field of a struct describes."""
        (name,) = where
        if name not in self.values:
            return default
        described = next(field.type for field in msgspec.structs.fields(kind) if field.name == name)
        converted: str = self._convert(self.values[name], described, where)
        return converted

    def check_names(self, where: Where, kind: type) -> None:
        """Raises for a name that the struct does not have, and for one in a struct within it."""
        known = {field.name: field.type for field in msgspec.structs.fields(kind)}
        for name, value in self.table(where).items():
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1) or difflib.get_close_matches(
                    name.lower().replace("-", "_"), known, n=1
                )
                meant = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
                raise self.error((*where, name), f"there is no such name; {meant}")
            within = known[name]
            if isinstance(within, type) and issubclass(within, msgspec.Struct) and isinstance(value, dict):
                self.check_names((*where, name), within)

    def error(self, where: Where, text: str) -> ConfigError:
        """An error about what stands at a place."""
        line = self.line_of(where)
        place = f"{self.path}:{line}" if line is not None else f"{self.path}"
        return ConfigError(f"{place}: {'.'.join(map(_shown_key, where)) or 'the file'}: {text}")

    def line_of(self, where: Where) -> int | None:
        """The line in which the entry at a place begins, counted from 1; its table's if it has none of its own."""
        depths = range(len(where), 0, -1)
        return next((line for depth in depths if (line := self._own_line(where[:depth])) is not None), None)

    def _own_line(self, where: Where) -> int | None:
        # The parser alone decides: the first line that, cut behind its key, adds the entry to what stands before it.
        lines = self._lines
        candidates = [number for number, line in enumerate(lines) if where[-1] in line]
        for number in candidates[:_MAX_CANDIDATES]:
            line = lines[number]
            before = "\n".join(lines[:number])
            for end in [match.start() for match in re.finditer("=|$", line)][:_MAX_CANDIDATES]:
                cut = line if end == len(line) else f"{line[:end]}= 0"
                if _says(f"{before}\n{cut}", where) and not _says(before, where):
                    return number + 1
        return None

    def _convert(self, value: Any, kind: Any, where: Where) -> Any:
        if (place := _zero_in(value, where)) is not None:
            raise self.error(place, "it has a character 0, which no path, name or address can have")
        try:
            return msgspec.convert(value, kind)
        except msgspec.ValidationError as error:
            said, _, path = str(error).partition(" - at `$")
            names = tuple(re.findall(r"\.(\w+)|\[(\d+)\]", path))
            given: Any = value
            for name, index in names:
                given = given[int(index)] if index else given[name]
            place = (*where, *(name for name, _ in names if name))
            if "missing required field" in said:
                raise self.error(place, said[:1].lower() + said[1:]) from None
            raise self.error(place, f"it is {_shown(given)}; {said[:1].lower()}{said[1:]}") from None


def _says(text: str, where: Where) -> bool:
    """Whether a text is whole, and has an entry at a place."""
    try:
        return _at(tomllib.loads(text), where) is not None
    except (ValueError, RecursionError):
        return False


def _at(values: Mapping[str, Any], where: Where) -> Any:
    """What stands at a place; None for nothing, which TOML has no word for."""
    found: Any = values
    for name in where:
        if not isinstance(found, dict) or name not in found:
            return None
        found = found[name]
    return found


def _zero_in(value: Any, where: Where) -> Where | None:
    """Where a text stands that the operating system would take for a shorter one, or refuse. As deep as structs are."""
    if isinstance(value, str):
        return where if "\0" in value else None
    inside = value.items() if isinstance(value, dict) else ()
    elements = value if isinstance(value, list) else ()
    places = (_zero_in(each, (*where, name)) for name, each in inside)
    found = next((place for place in places if place is not None), None)
    return found or next((where for each in elements if _zero_in(each, where) is not None), None)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."


def _shown_key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]{1,64}", name) else _shown(name)
