"""Processes with everything under them: ended, and shown to be gone. Used by whoever starts processes in a test."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import psutil

STOP_SECONDS = 60.0
GONE_SECONDS = 60.0


def alive_after(processes: Sequence[psutil.Process], seconds: float) -> list[psutil.Process]:
    """Those that still run after so long."""
    deadline = time.monotonic() + seconds
    pause = threading.Event()
    while (left := [one for one in processes if is_alive(one)]) and time.monotonic() < deadline:
        pause.wait(0.01)
    return left


def is_alive(process: psutil.Process) -> bool:
    """Whether it has not ended. An orphan that has is listed as a zombie until init asks for it: that took 1.5 s on a
    quiet machine, and once more than ten on a busy one."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def workers_of(node: int) -> list[psutil.Process]:
    """The worker processes of a node, in the order of their start; not the one that they are copied from."""
    children = psutil.Process(node).children()
    workers = list[tuple[float, int, psutil.Process]]()
    for child in children:
        # One may end between being listed and being looked at.
        with contextlib.suppress(psutil.NoSuchProcess):
            if child.name().startswith("llmscale-rank"):
                workers.append((child.create_time(), child.pid, child))
    return [child for _, _, child in sorted(workers, key=lambda each: each[:2])]


def end(process: subprocess.Popen[Any], kill: Callable[[], None], log: Callable[[], str]) -> None:
    """Ends a child with SIGTERM and checks that nothing under it is left. `kill` is for one that does not end."""
    family = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            kill()
            process.wait()
            raise AssertionError(f"SIGTERM did not end it:\n{log()}") from None
    left = alive_after(family, GONE_SECONDS)
    for orphan in left:
        orphan.kill()
    assert not left, f"left running after SIGTERM: {left}"
