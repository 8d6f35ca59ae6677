"""A model folder on disk, read within its own walls.

Resolves plain file names to regular files inside the folder, or inside the `blobs` folder beside it when the folder is
a snapshot of the Hugging Face cache, which consists of links to `../../blobs/`. Reads JSON under a size limit. Each
call costs one path resolution. It does not know what the files mean.
"""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import NoReturn

from llmscale.errors import InvalidCheckpoint

MAX_JSON_BYTES = 64 << 20
"""Limit of config.json and of the shard index; the index of a 700 B model is about 9 MB."""


class ModelFolder:
    """A folder, resolved once. Raises InvalidCheckpoint if it is not there."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            self._root = self.path.resolve(strict=True)
        except (OSError, RuntimeError) as error:
            raise InvalidCheckpoint(f"Model folder {str(path)!r} cannot be opened: {error}.") from error
        if not self._root.is_dir():
            raise InvalidCheckpoint(f"{str(path)!r} is a file; give the folder that holds config.json.")
        self._allowed = [self._root]
        if self._root.parent.name == "snapshots":
            self._allowed.append(self._root.parent.parent / "blobs")

    def has(self, name: str) -> bool:
        """Whether an entry of this name exists, whatever it is."""
        return (self._root / _plain(name)).exists()

    def names(self, suffix: str) -> list[str]:
        """Sorted names of the folder's entries that end with `suffix`."""
        return sorted(entry.name for entry in self._root.iterdir() if entry.name.endswith(suffix))

    def file(self, name: str) -> Path:
        """The real path of a regular file of the folder.

        Raises InvalidCheckpoint if the name is not a plain name, if it is missing or not a regular file (a pipe would
        block its reader for ever), or if links lead out of the folder.
        """
        path = self._root / _plain(name)
        try:
            real = path.resolve(strict=True)
            mode = real.stat().st_mode
        except (OSError, RuntimeError) as error:
            raise InvalidCheckpoint(f"{name!r} is missing from model folder {str(self.path)!r}.") from error
        if not any(real.is_relative_to(root) for root in self._allowed):
            raise InvalidCheckpoint(
                f"{name!r} is a link that leaves model folder {str(self.path)!r}. Copy the file into the folder."
            )
        if not stat.S_ISREG(mode):
            raise InvalidCheckpoint(f"{name!r} in model folder {str(self.path)!r} is not a regular file.")
        return real

    def json_object(self, name: str) -> dict[str, object]:
        """The JSON object in a file. Raises InvalidCheckpoint if it is too large, not JSON or not an object."""
        path = self.file(name)
        size_bytes = path.stat().st_size
        if size_bytes > MAX_JSON_BYTES:
            raise InvalidCheckpoint(f"{name!r} has {size_bytes:,} bytes, the limit is {MAX_JSON_BYTES:,}.")
        return parse_json_object(path.read_bytes(), name)


def parse_json_object(data: bytes, name: str) -> dict[str, object]:
    """Strict JSON: UTF-8, one object, no key twice in an object, no NaN or Infinity.

    Raises InvalidCheckpoint with the reason; `name` says where the text came from.
    """
    try:
        value = json.loads(data.decode(), object_pairs_hook=_unique, parse_constant=_refuse_constant)
    # RecursionError: nesting beyond the interpreter's limit is not a config; ValueError covers bad UTF-8 and JSON.
    except (ValueError, RecursionError) as error:
        raise InvalidCheckpoint(f"{name!r} is not valid JSON: {error}.") from error
    if not isinstance(value, dict):
        raise InvalidCheckpoint(f"{name!r} holds a JSON {type(value).__name__}, expected an object.")
    return value


def _plain(name: str) -> str:
    if name in ("", ".", "..") or "/" in name or "\\" in name or "\0" in name:
        raise InvalidCheckpoint(f"File name {name!r} is not a plain name inside the model folder.")
    return name


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"key {key!r} appears twice")
            seen.add(key)
    return result


def _refuse_constant(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")
