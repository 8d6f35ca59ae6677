"""Real processes for tests: a server on a free port, what it says, who its children are, and that all of them are gone
at the end. Waits are on conditions with deadlines, never on time alone.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pytest

from tests import family
from tests.network import Host

ROOT = Path(__file__).parents[1]
WITHOUT_TORCH = ROOT / "tests" / "fakes" / "without_torch"

START_SECONDS = 120.0
# For the output of a server that has ended; what it left running would keep it open.
LOG_SECONDS = 5.0
# A gateway that other hosts reach has keys.
API_KEY = "a-key-for-tests"


@contextmanager
def base_install() -> Iterator[None]:
    """Processes that start meanwhile find the packages of the base install alone: no torch, numpy or safetensors."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(map(str, (WITHOUT_TORCH, ROOT / "python"))))
        yield


def wait_until(condition: Callable[[], bool], seconds: float, what: str, seen: Callable[[], object] = str) -> None:
    """Polls a condition until it holds; fails with `what` when time is up, and with what is `seen` then."""
    deadline = time.monotonic() + seconds
    pause = threading.Event()
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds:g} s: {what} {seen()}")
        pause.wait(0.01)


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    """The process stands still while the block runs."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        # Whoever stands still for too long is replaced; what the test then finds says more than this would.
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


# Where the ports begin that a system gives to connections and to whoever asks for any.
LOWEST_GIVEN_PORT = 32_768
# One number of UDP for each port that was chosen; they end with this process.
_chosen: list[socket.socket] = []


def free_port() -> int:
    """A port that nobody listens on now, and that nobody takes before the process that it is for: it is below those
    that the system gives away, and other tests find its number of UDP, which no server uses, taken."""
    while True:
        port = random.randrange(10_000, LOWEST_GIVEN_PORT)
        mark = socket.socket(type=socket.SOCK_DGRAM)
        try:
            mark.bind(("", port))
            with socket.socket() as probe:
                probe.bind(("", port))
        except OSError:
            mark.close()
            continue
        _chosen.append(mark)
        return port


@dataclass
class Server:
    """`llmscale serve`, or a gateway alone, as a child of the test."""

    process: subprocess.Popen[str]
    port: int
    host: str = "127.0.0.1"
    lines: list[str] = field(default_factory=list)
    reader: threading.Thread | None = None
    # One client for all questions: making one loads certificates for a tenth of a second.
    client: httpx2.Client = field(default_factory=lambda: httpx2.Client(timeout=300))

    @property
    def base(self) -> str:
        """Where it answers."""
        return f"http://{self.host}:{self.port}"

    def get(self, path: str) -> httpx2.Response:
        """One GET."""
        return self.client.get(self.base + path)

    def post(self, path: str, body: dict[str, Any]) -> httpx2.Response:
        """One POST of JSON."""
        return self.client.post(self.base + path, json=body)

    def replicas(self) -> list[dict[str, Any]]:
        """What the gateway says of each."""
        found: list[dict[str, Any]] = self.get("/fleet").json()["replicas"]
        return found

    def states(self) -> list[str]:
        """Of each replica, as the gateway sees it."""
        return [one["state"] for one in self.replicas()]

    def held(self) -> int:
        """Requests that replicas have."""
        return sum(one["running"] + one["waiting"] for one in self.replicas())

    def steps(self) -> int:
        """How many the replicas have computed."""
        return sum(one["steps"] for one in self.replicas())

    def worker_pid(self) -> int:
        """The worker that is alive now, by what the fleet says of itself; waits for one after a death. There is none
        for a moment then, and whoever kills process 0 kills this one."""
        found = [0]

        def is_there() -> bool:
            found[0] = self.replicas()[0]["worker_pid"]
            return found[0] > 0

        wait_until(is_there, START_SECONDS, "there is a worker")
        return found[0]

    def metric(self, name: str) -> float:
        """The value of a metric that has no labels."""
        lines = [line.split() for line in self.get("/metrics").text.splitlines()]
        return float(next(words[1] for words in lines if words and words[0] == f"llmscale:{name}"))

    def is_ready(self) -> bool:
        """Whether a step of every model has run."""
        return self._is_well("/health/ready")

    def is_alive(self) -> bool:
        """Whether it answers."""
        return self._is_well("/health/live")

    def _is_well(self, path: str) -> bool:
        try:
            return self.get(path).status_code == 200
        except httpx2.TransportError:
            return False

    def family(self) -> list[psutil.Process]:
        """The server and every process under it."""
        parent = psutil.Process(self.process.pid)
        return [parent, *parent.children(recursive=True)]

    def log(self) -> str:
        """Everything it has said. Of one that has ended, also what was still on its way: a test once found nothing."""
        if self.reader is not None and self.process.poll() is not None:
            self.reader.join(LOG_SECONDS)
        return "".join(self.lines)


@contextmanager
def serving(model: str = "tiny-chat", *options: str) -> Iterator[Server]:
    """A server that is ready; afterwards it is ended and nothing of it is left."""
    port = free_port()
    command = [sys.executable, "-m", "llmscale.cli", "serve", model, "--port", str(port), *options]
    with _running(command, port) as server:
        yield server


@contextmanager
def serving_fleet(
    folder: Path, text: str, *, module: str = "llmscale.cli serve", is_ready: bool = True
) -> Iterator[Server]:
    """The models of a fleet file, which is written with a free port; ready, or only alive if that is not wanted."""
    port = free_port()
    file = folder / "llmscale.toml"
    file.write_text(f"[gateway]\nport = {port}\n{text}", encoding="utf-8")
    with _running(
        [sys.executable, "-m", *module.split(), "--fleet-file", str(file)], port, is_ready=is_ready
    ) as server:
        yield server


@contextmanager
def gateway(nodes: Sequence[str], *options: str, on: Host | None = None) -> Iterator[Server]:
    """A gateway for tiny-chat in front of running nodes, ready; afterwards nothing of it is left. `on` is the host that
    it runs on, if not this one."""
    port = free_port()
    command = [sys.executable, "-m", "llmscale.gateway", "--model", "tiny-chat", "--port", str(port)]
    command += ["--nodes", *nodes, *options]
    if on is None:
        with _running(command, port) as server:
            yield server
        return
    command = [*on.words, *command, "--host", on.address, "--api-key", API_KEY]
    with _running(command, port, on.address, {"authorization": f"Bearer {API_KEY}"}) as server:
        yield server


@contextmanager
def _running(
    command: list[str],
    port: int,
    host: str = "127.0.0.1",
    headers: dict[str, str] | None = None,
    *,
    is_ready: bool = True,
) -> Iterator[Server]:
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    server = Server(process, port, host)
    server.client.headers.update(headers or {})
    assert process.stdout is not None
    output = process.stdout
    server.reader = threading.Thread(target=lambda: server.lines.extend(iter(output.readline, "")), daemon=True)
    server.reader.start()
    try:
        try:
            answers = server.is_ready if is_ready else server.is_alive
            wait_until(lambda: answers() or process.poll() is not None, START_SECONDS, "the server is ready")
        except AssertionError as error:
            raise AssertionError(f"{error}\n{server.log()}") from None
        assert process.poll() is None, f"the server ended with code {process.returncode}:\n{server.log()}"
        yield server
    finally:
        try:
            family.end(process, lambda: os.killpg(process.pid, signal.SIGKILL), server.log)
        finally:
            server.client.close()
            server.reader.join(LOG_SECONDS)
            output.close()


@dataclass(frozen=True, slots=True)
class Sampled:
    """A token of a stream by its text, with its log probability and those of the best tokens, the likeliest first."""

    text: str
    logprob: float
    best: tuple[float, ...]


def sampled(
    server: Server,
    body: dict[str, Any],
    on_tokens: Callable[[int], None] | None = None,
    best: int = 0,
    on_comment: Callable[[str], None] = lambda _: None,
) -> list[Sampled]:
    """Streams a completion with log probabilities and returns every token, calling back with the count so far and with
    the stream's comments."""
    tokens: list[Sampled] = []
    with server.client.stream(
        "POST", server.base + "/v1/completions", json={**body, "stream": True, "logprobs": best}
    ) as response:
        assert response.status_code == 200, response.read()
        for data in _events(response, on_comment):
            assert "error" not in data, data
            for choice in data["choices"]:
                rows = choice["logprobs"]
                if rows is not None:
                    tops = (tuple(sorted(row.values(), reverse=True)) for row in rows["top_logprobs"])
                    tokens += map(Sampled, rows["tokens"], rows["token_logprobs"], tops)
            if on_tokens is not None:
                on_tokens(len(tokens))
    return tokens


def token_ids(server: Server, body: dict[str, Any], on_tokens: Callable[[int], None] | None = None) -> list[str]:
    """The texts of the tokens of `sampled`."""
    return [token.text for token in sampled(server, body, on_tokens)]


def _events(response: httpx2.Response, on_comment: Callable[[str], None]) -> Iterator[dict[str, Any]]:
    """The events of a stream; it must end with [DONE] and nothing may follow."""
    lines = response.iter_lines()
    for line in lines:
        if line.startswith(":"):
            on_comment(line.removeprefix(":").strip())
        if not line.startswith("data: "):
            continue
        if line == "data: [DONE]":
            assert not any(lines), "something follows [DONE]"
            return
        yield json.loads(line.removeprefix("data: "))
    raise AssertionError("the stream ended without [DONE]")
