"""What holds for every test: how Hypothesis looks for examples, and a fixture for tests of tiny products."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import settings

# An example of 0.7 ms took 338 ms once, because other processes had the cores: time proves nothing here.
settings.register_profile("llmscale", deadline=None)
settings.load_profile("llmscale")


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Two threads on tiny products only wait for each other, a hundred times longer when the machine is busy."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
