"""Compilers run inside the first tests that need their product: their time is the machine's, not a test's."""

from __future__ import annotations

from pathlib import Path

import pytest

# nvcc took 117 s for a file of 17 CPU seconds beside eight busy processes on two cores.
COMPILER_SECONDS = 900


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.timeout(COMPILER_SECONDS))
