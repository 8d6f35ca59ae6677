"""Fixtures of the gateway's tests: a real small tokenizer, made once."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest
import uvloop

from llmscale.tokenizer import Tokenizer
from tests.fakes.tiny_tokenizer import VOCABULARY, write_byte_level


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    return Tokenizer(write_byte_level(folder), vocabulary=VOCABULARY)


def pytest_asyncio_loop_factories() -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    """The event loop that the gateway runs on in production."""
    return {"uvloop": uvloop.new_event_loop}
