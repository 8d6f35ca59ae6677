"""One server for all tests that leave it as they found it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

from tests.processes import Server, base_install, serving


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """tiny-chat, ready, in the base install."""
    with contextlib.ExitStack() as stack:
        with base_install():
            started = stack.enter_context(serving("tiny-chat"))
        yield started
