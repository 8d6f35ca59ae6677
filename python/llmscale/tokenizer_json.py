"""The JSON files of a model folder that are about its text, each read whole under a limit of bytes.

What is malformed or too large is InvalidTokenizer with the file's name. Linear in the file. It does not know what a
tokenizer does with them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from llmscale.errors import InvalidTokenizer

MAX_DEFINITION_BYTES: Final = 256 << 20
"""Of tokenizer.json."""
MAX_SETTINGS_BYTES: Final = 8 << 20
"""Of every other file."""


def read_definition(folder: Path) -> dict[str, Any]:
    """tokenizer.json. Raises InvalidTokenizer, OSError where there is none."""
    return _read(folder / "tokenizer.json", MAX_DEFINITION_BYTES)


def read_settings(folder: Path, name: str = "tokenizer_config.json") -> dict[str, Any]:
    """A file that need not be there; empty then. Raises InvalidTokenizer."""
    path = folder / name
    return _read(path, MAX_SETTINGS_BYTES) if path.is_file() else {}


def token_text(value: object) -> str | None:
    """A token as tokenizer_config.json writes it: a text, or an object with its text."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) and value else None


def _read(path: Path, max_bytes: int) -> dict[str, Any]:
    size = path.stat().st_size
    if size > max_bytes:
        raise InvalidTokenizer(f"{path.name} has {size} bytes, the limit is {max_bytes}")
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise InvalidTokenizer(f"{path.name} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise InvalidTokenizer(f"{path.name} must hold a JSON object, not {type(content).__name__}")
    return content
