"""The ids that end a sequence: those that a model's configs list, and the token that its tokenizer calls the end.

A fine-tune to another chat format often changes the tokenizer's alone, so an engine that knew only the listed ones
would never stop. The engine that ends sequences and the tokenizer that says what ended them both ask here. Linear in
the vocabulary. It does not know which config lists what.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from llmscale.tokenizer_json import read_definition, read_settings, token_text


def end_token_ids(listed: Iterable[int], definition: Mapping[str, Any], settings: Mapping[str, Any]) -> tuple[int, ...]:
    """In ascending order. `definition` is tokenizer.json's content, `settings` tokenizer_config.json's."""
    text = token_text(settings.get("eos_token"))
    named = None if text is None else _id(text, definition)
    return tuple(sorted({*listed} if named is None else {*listed, named}))


def folder_end_token_ids(listed: Iterable[int], folder: Path) -> tuple[int, ...]:
    """With the tokenizer of a folder, which need not have one. Raises InvalidTokenizer for malformed files."""
    settings = read_settings(folder)
    # The large file is not opened where there is nothing to look for.
    if token_text(settings.get("eos_token")) is None or not (folder / "tokenizer.json").is_file():
        return tuple(sorted({*listed}))
    return end_token_ids(listed, read_definition(folder), settings)


def _id(text: str, definition: Mapping[str, Any]) -> int | None:
    """Of a token by its text. The library takes the model's id for a token that is added as well."""
    model = definition.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    found: object = None
    if isinstance(vocabulary, dict):
        found = vocabulary.get(text)
    elif isinstance(vocabulary, list):
        # Unigram: pairs of text and score in the order of ids.
        texts = (pair[0] if isinstance(pair, list) and pair else None for pair in vocabulary)
        found = next((place for place, content in enumerate(texts) if content == text), None)
    if found is None:
        added = definition.get("added_tokens")
        entries = [entry for entry in added if isinstance(entry, dict)] if isinstance(added, list) else []
        found = next((entry.get("id") for entry in entries if entry.get("content") == text), None)
    return found if isinstance(found, int) and not isinstance(found, bool) and found >= 0 else None
