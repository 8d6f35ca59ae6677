"""What holds for every test: how Hypothesis looks for examples, and how fast the processor is where that matters."""

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


@pytest.fixture(scope="module")
def slow_processor() -> Iterator[None]:
    """The kernels' slowest level, in this process and those that it starts: streams of a small model last long enough
    to be seen in the middle, and its blocks are worth a disk, which they are not where computing one takes a tenth of
    reading it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLMSCALE_CPU_LEVEL", "portable")
        yield
