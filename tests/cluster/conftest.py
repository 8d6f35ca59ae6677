"""The keys of one fleet for all tests of this folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmscale.cli.keys import run
from tests.fleet import Fleet


@pytest.fixture(scope="session")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Fleet:
    """Keys of nodes, a gateway and a client, and beside them those of a fleet that nobody here knows."""
    folder: Path = tmp_path_factory.mktemp("fleet")
    for name in ("keys", "strangers"):
        run(folder / name, ("node", "gateway:edge", "client:app:acme"), force=False)
    return Fleet(folder / "keys", folder / "strangers")
