"""What holds for every test: how Hypothesis looks for examples, how fast the processor is where that matters, and that
the process hears its signals as before."""

from __future__ import annotations

import inspect
import logging
import signal
from collections.abc import Generator, Iterator

import pytest
from hypothesis import settings

# An example of 0.7 ms took 338 ms once, because other processes had the cores: time proves nothing here.
settings.register_profile("llmscale", deadline=None)
settings.load_profile("llmscale")


_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_AT_FIRST = {number: signal.getsignal(number) for number in _SIGNALS}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Lets a coroutine that takes too long end its process. The usual error comes from a handler of SIGALRM, which
    uvloop reports and forgets: a test waited for ever after its 600 s."""
    for item in items:
        if inspect.iscoroutinefunction(getattr(item, "function", None)):
            item.add_marker(pytest.mark.timeout(method="thread"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown() -> Generator[None, None, None]:
    """Fails the test that leaves a handler of a signal: the next one that raises it, in another file, ends the run."""
    yield
    left = {
        number.name: signal.getsignal(number) for number in _SIGNALS if signal.getsignal(number) != _AT_FIRST[number]
    }
    for number, handler in _AT_FIRST.items():
        signal.signal(number, handler)
    assert not left, f"the test left handlers of signals: {left}"


@pytest.fixture
def own_logging() -> Iterator[None]:
    """For tests that call an entry point in this process: it writes to the captured stderr of that test, which is
    closed when the next one logs."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


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
