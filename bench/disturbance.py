"""How much of the machine others used while something was measured: what a comparison is worth.

Busy time of all processors less that of this process, of its children that have ended and of a process group that still
runs, over the time of all processors, from /proc. Where the system has no /proc/stat nothing is known. A few reads, and
one per process for a group; does not know what ran.
"""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

_STAT = Path("/proc/stat")
BUSY_FIELDS = (0, 1, 2, 5, 6, 7)
"""user, nice, system, irq, softirq and steal; not idle and not iowait."""


def busy_ticks(text: str) -> int:
    """Of the first line of /proc/stat, since the machine started."""
    fields = [int(word) for word in text.splitlines()[0].split()[1:]]
    return sum(fields[index] for index in BUSY_FIELDS)


def group_seconds(group: int, processes: Path = Path("/proc")) -> float:
    """Processor time of a group's processes and of their children that have ended."""
    ticks = 0
    for entry in processes.glob("[0-9]*"):
        # A process may end while it is looked at.
        with contextlib.suppress(OSError):
            # After the name, which may hold anything: state, parent, group, ...
            fields = (entry / "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
            if int(fields[2]) == group:
                ticks += sum(int(field) for field in fields[11:15])
    return ticks / os.sysconf("SC_CLK_TCK")


class Watch:
    """From its making to `stop`."""

    def __init__(self) -> None:
        self._share: float | None = None
        self._is_over = False
        self._start = time.monotonic()
        self._busy = _busy_seconds()
        self._own = _own_seconds()

    def stop(self, group: int | None = None) -> float | None:
        """The share of the time of all processors, 0 to 1; None where it cannot be known. The first call counts.

        A server that was started meanwhile is not the others: name its group before it is ended, because processes that
        nobody waits for take their times with them.
        """
        busy = _busy_seconds()
        if self._is_over or busy is None or self._busy is None:
            return self._share
        own = _own_seconds() - self._own + (0.0 if group is None else group_seconds(group))
        seconds = (time.monotonic() - self._start) * (os.cpu_count() or 1)
        self._share = min(1.0, max(0.0, (busy - self._busy - own) / seconds)) if seconds > 0 else 0.0
        self._is_over = True
        return self._share


def _busy_seconds() -> float | None:
    if not _STAT.is_file():
        return None
    return busy_ticks(_STAT.read_text(encoding="ascii")) / os.sysconf("SC_CLK_TCK")


def _own_seconds() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system
