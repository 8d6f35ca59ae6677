"""One replica on several hosts for tests: a leader that has run its first step, and followers that can be replaced.

Every process is a child of the test with a log of its own; afterwards nothing of them is left. It knows no network: a
host is whatever its command begins with.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests import family


@dataclass
class HostProcess:
    """`python -m llmscale.node` on one host, from its command to its end."""

    process: subprocess.Popen[bytes]
    log_path: Path

    def log(self) -> str:
        """Everything it has said."""
        return self.log_path.read_text()

    def workers(self) -> list[psutil.Process]:
        """Its ranks, in the order of their start."""
        if self.process.poll() is not None:
            return []
        return family.workers_of(self.process.pid)

    def end(self, seconds: float) -> tuple[int, str]:
        """Exit code and log of a process that ends by itself."""
        try:
            code = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"it still runs after {seconds:g} s:\n{self.log()}") from None
        return code, self.log()


@contextmanager
def host_process(folder: Path, name: str, words: Sequence[str], *options: str) -> Iterator[HostProcess]:
    """Starts a node with `words` before its command."""
    with script(folder, name, [*words, sys.executable, "-m", "llmscale.node", *options]) as started:
        yield started


@contextmanager
def script(
    folder: Path, name: str, words: Sequence[str], environment: dict[str, str] | None = None
) -> Iterator[HostProcess]:
    """Starts whatever starts nodes, and ends it with SIGTERM."""
    log_path = folder / f"{name}.log"
    with log_path.open("wb") as log:
        process = subprocess.Popen(words, stdout=log, stderr=log, start_new_session=True, env=environment)
    started = HostProcess(process, log_path)
    try:
        yield started
    finally:
        family.end(process, process.kill, started.log)


class Followers:
    """The hosts of a group that have no engine, by index."""

    def __init__(self, folder: Path, words: dict[int, Sequence[str]], options: Sequence[str]) -> None:
        self._folder = folder
        self._words = words
        self._options = options
        self._stack = ExitStack()
        self._starts = 0
        self.by_index: dict[int, HostProcess] = {}

    def start(self, index: int) -> HostProcess:
        """Starts a host, or starts it again."""
        self._starts += 1
        name = f"host{index}-{self._starts}"
        options = (*self._options, "--host-index", str(index))
        started = self._stack.enter_context(host_process(self._folder, name, self._words[index], *options))
        self.by_index[index] = started
        return started

    def close(self) -> None:
        """Ends all."""
        self._stack.close()
