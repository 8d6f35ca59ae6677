"""A node as a real process for tests: started, waited for by what it says over its own protocol, gone at the end."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from llmscale import Client
from llmscale.client import CurveKeys
from llmscale.errors import TransportError
from tests import family
from tests.network import Host

START_SECONDS = 180.0


@dataclass
class NodeProcess:
    """`python -m llmscale.node` as a child of the test."""

    process: subprocess.Popen[bytes]
    address: str
    log_path: Path

    def log(self) -> str:
        """Everything it has said."""
        return self.log_path.read_text()

    def worker(self) -> psutil.Process:
        """The worker that serves now."""
        ready = [line for line in self.log().splitlines() if "worker ready" in line]
        found = re.findall(r"\bpid\W+(\d+)", ready[-1]) if ready else []
        assert found, f"the node has no worker:\n{self.log()}"
        return psutil.Process(int(found[0]))

    def kill(self) -> None:
        """Ends node and worker without a word."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(family.STOP_SECONDS)


@contextmanager
def node(
    folder: Path,
    *options: str,
    address: str = "",
    listen: str = "",
    keys: CurveKeys | None = None,
    on: Host | None = None,
) -> Iterator[NodeProcess]:
    """A node on tiny-chat that has run its first step; afterwards nothing of it is left. `listen` says where it
    listens when that is not the address at which it is reached, `on` the host that it runs on if that is not this."""
    address = address or f"ipc://{folder}/node.sock"
    log_path = folder / "node.log"
    command = [sys.executable, "-m", "llmscale.node", "--model", "tiny-chat", "--listen", listen or address, *options]
    if on is not None:
        command = [*on.words, *command]
    with log_path.open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    started = NodeProcess(process, address, log_path)
    try:
        _wait_until_ready(started, keys)
        yield started
    finally:
        family.end(process, started.kill, started.log)


def _wait_until_ready(started: NodeProcess, keys: CurveKeys | None) -> None:
    """Welcome and Status come once the first worker knows its kernels; a first token once a step can run."""
    with Client(started.address, keys=keys, connect_timeout=START_SECONDS) as client:
        try:
            client.generate([1], timeout=START_SECONDS)
        except TransportError as error:
            raise AssertionError(f"the node did not start: {error}\n{started.log()}") from error
