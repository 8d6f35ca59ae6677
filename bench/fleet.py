"""Nodes of one machine behind one gateway, for benchmarks that do harm to them: started, killed, frozen, started again.

Nodes are reached through sockets in a folder; what the gateway says of them is asked over HTTP, 1 ms per question. It
knows nothing of requests.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.server import MAX_START_SECONDS, free_port

_POLL_SECONDS = 0.005
MAX_EXIT_SECONDS = 60.0


@dataclass
class Node:
    """One node and the process that it is now."""

    command: list[str]
    process: subprocess.Popen[bytes]

    def start_again(self) -> None:
        """After its death."""
        self.process.wait(MAX_EXIT_SECONDS)
        self.process = _start(self.command)

    def kill(self) -> None:
        """Without a word; the kernel ends its workers with it."""
        self.process.kill()

    def freeze(self) -> None:
        """It lives and says nothing, as behind a broken switch."""
        self.process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Undoes `freeze`."""
        self.process.send_signal(signal.SIGCONT)


@dataclass(frozen=True)
class Fleet:
    """Running nodes and the port of their gateway."""

    nodes: list[Node]
    port: int

    def replicas(self) -> list[dict[str, Any]]:
        """What the gateway knows of each node."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/fleet", timeout=10) as response:
            found: list[dict[str, Any]] = json.load(response)["replicas"]
            return found

    def model(self) -> str:
        """What the gateway calls the model."""
        name: str = self.replicas()[0]["model"]
        return name

    def all_ready(self) -> bool:
        """Whether every node would take a request."""
        try:
            states = [replica["state"] for replica in self.replicas()]
        except (urllib.error.URLError, OSError):
            return False
        return states == ["ready"] * len(self.nodes)

    def metric(self, name: str) -> float:
        """A counter of the gateway that has no labels."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=10) as response:
            lines = [line.split() for line in response.read().decode().splitlines()]
        return float(next(words[1] for words in lines if words and words[0] == f"llmscale:{name}"))

    def node_of(self, worker_pid: int) -> Node:
        """The node whose worker this is."""
        parent = int(Path(f"/proc/{worker_pid}/stat").read_text().rpartition(")")[2].split()[1])
        return next(node for node in self.nodes if node.process.pid == parent)


def wait_until(condition: Callable[[], bool], seconds: float, what: str) -> float:
    """Polls until a condition holds; returns the time at which it was seen to. Raises TimeoutError with `what`."""
    deadline = time.perf_counter() + seconds
    while not condition():
        if time.perf_counter() > deadline:
            raise TimeoutError(f"not within {seconds:g} s: {what}")
        time.sleep(_POLL_SECONDS)
    return time.perf_counter()


@contextlib.contextmanager
def fleet(model: str, nodes: int, *options: str) -> Iterator[Fleet]:
    """Starts nodes with these options and a gateway, and ends them all."""
    with tempfile.TemporaryDirectory(prefix="llmscale-bench-") as folder, contextlib.ExitStack() as running:
        addresses = [f"ipc://{folder}/{number}" for number in range(nodes)]
        started = []
        for address in addresses:
            words = ["--model", model, "--listen", address, "--parent", str(os.getpid()), *options]
            command = [sys.executable, "-m", "llmscale.node", *words]
            started.append(Node(command, _start(command)))
            running.callback(_end, started[-1])
        made = Fleet(started, _gateway(model, addresses, running))
        wait_until(made.all_ready, MAX_START_SECONDS, "every node is ready")
        yield made


@contextlib.contextmanager
def hosts(model: str, count: int, *options: str) -> Iterator[Fleet]:
    """One replica over `count` hosts: nodes of this machine that meet on loopback. Only the first one is a node to the
    gateway."""
    with tempfile.TemporaryDirectory(prefix="llmscale-bench-") as folder, contextlib.ExitStack() as running:
        address, leader = f"ipc://{folder}/leader", f"127.0.0.1:{free_port()}"
        words = ["--model", model, "--listen", address, "--parent", str(os.getpid()), "--no-spare-worker", *options]
        words += ["--hosts", str(count), "--leader", leader]
        started = []
        for index in range(count):
            command = [sys.executable, "-m", "llmscale.node", *words, "--host-index", str(index)]
            started.append(Node(command, _start(command)))
            running.callback(_end, started[-1])
        made = Fleet(started[:1], _gateway(model, [address], running))
        wait_until(made.all_ready, MAX_START_SECONDS, "the replica is ready on all hosts")
        yield made


def _gateway(model: str, addresses: list[str], running: contextlib.ExitStack) -> int:
    """Starts a gateway to these nodes; its port."""
    port = free_port()
    words = ["--model", model, "--port", str(port), "--nodes", *addresses]
    running.callback(_end, Node([], _start([sys.executable, "-m", "llmscale.gateway", *words])))
    return port


def _start(command: list[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def _end(node: Node) -> None:
    """A frozen process hears SIGTERM when it is thawed."""
    if node.process.poll() is None:
        node.process.terminate()
        node.thaw()
        try:
            node.process.wait(MAX_EXIT_SECONDS)
        except subprocess.TimeoutExpired:
            node.kill()
            node.process.wait()
