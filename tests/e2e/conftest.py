"""One server for all tests that leave it as they found it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.processes import Server, serving


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """tiny-chat, ready."""
    with serving("tiny-chat") as server:
        yield server
