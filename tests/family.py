"""Processes with everything under them: ended, and shown to be gone. Used by whoever starts processes in a test."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Callable, Sequence
from typing import Any

import psutil

STOP_SECONDS = 20.0
GONE_SECONDS = 5.0


def alive_after(processes: Sequence[psutil.Process], seconds: float) -> list[psutil.Process]:
    """Those that still run after so long. An orphan that has ended is listed as a zombie until init asks for it, which
    took more than two seconds on a busy machine; it is not alive."""
    return [one for one in psutil.wait_procs(processes, timeout=seconds)[1] if not _is_zombie(one)]


def _is_zombie(process: psutil.Process) -> bool:
    try:
        return bool(process.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


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
