"""One thread for all tests of this folder."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _always_one_thread(one_thread: None) -> None:
    """See `one_thread`."""
