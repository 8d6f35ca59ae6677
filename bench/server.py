"""A server for a benchmark: one that is running already, or `llmscale serve` started and ended here."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

MAX_START_SECONDS = 180.0


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def resident_bytes(group: int) -> int:
    """Resident memory of all processes of a process group; shared pages count in each."""
    page = os.sysconf("SC_PAGE_SIZE")
    total = 0
    for entry in Path("/proc").glob("[0-9]*"):
        # A process may end while it is looked at.
        with contextlib.suppress(OSError):
            if int((entry / "stat").read_text().rpartition(")")[2].split()[2]) == group:
                total += int((entry / "statm").read_text().split()[1]) * page
    return total


def installed_environment() -> dict[str, str]:
    """This process's, but that Python may keep the bytecode that it makes: an installed package has its own."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}


@contextlib.contextmanager
def serving(
    model: str, *options: str, threads: int | None = None, max_start_seconds: float = MAX_START_SECONDS
) -> Iterator[tuple[int, int, float]]:
    """Starts a server on loopback: its port, its process group, and the seconds until it was ready."""
    port = free_port()
    command = [sys.executable, "-m", "llmscale.cli", "serve", model, "--port", str(port), *options]
    command += [] if threads is None else ["--threads", str(threads)]
    with running(command, f"http://127.0.0.1:{port}/health/ready", max_start_seconds) as (group, seconds):
        yield port, group, seconds


@contextlib.contextmanager
def running(
    command: Sequence[str],
    ready_url: str,
    max_start_seconds: float = MAX_START_SECONDS,
    environment: Mapping[str, str] | None = None,
) -> Iterator[tuple[int, float]]:
    """Starts any server, in this environment with `environment` over it: its process group, and the seconds until
    `ready_url` answered 200.
    """
    start = time.perf_counter()
    process = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        env=installed_environment() | (environment or {}),
    )
    try:
        while not _is_ready(ready_url):
            if process.poll() is not None:
                raise RuntimeError(f"`{' '.join(command)}` ended with code {process.returncode}")
            if time.perf_counter() - start > max_start_seconds:
                raise RuntimeError(f"`{' '.join(command)}` was not ready within {max_start_seconds:g} s")
            time.sleep(0.005)
        yield process.pid, time.perf_counter() - start
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _is_ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False
