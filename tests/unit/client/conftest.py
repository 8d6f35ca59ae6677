"""Fixtures of the client's tests: a real small tokenizer, made once."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmscale.tokenizer import Tokenizer
from tests.fakes.tiny_tokenizer import VOCABULARY, write_byte_level


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    return Tokenizer(write_byte_level(folder), vocabulary=VOCABULARY)
