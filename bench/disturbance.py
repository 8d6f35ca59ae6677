"""How much of the machine others used while something was measured: what a comparison is worth.

Busy time of all processors less that of this process and of its children that have ended, over the time of all
processors, from /proc/stat. Where the system has no such file nothing is known. A few reads; does not know what ran.
"""

from __future__ import annotations

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


class Watch:
    """From its making to `others_share`."""

    def __init__(self) -> None:
        self._start = time.monotonic()
        self._busy = _busy_seconds()
        self._own = _own_seconds()

    def others_share(self) -> float | None:
        """Of the time of all processors, 0 to 1; None where it cannot be known."""
        busy = _busy_seconds()
        if busy is None or self._busy is None:
            return None
        others = (busy - self._busy) - (_own_seconds() - self._own)
        seconds = (time.monotonic() - self._start) * (os.cpu_count() or 1)
        return min(1.0, max(0.0, others / seconds)) if seconds > 0 else 0.0


def _busy_seconds() -> float | None:
    if not _STAT.is_file():
        return None
    return busy_ticks(_STAT.read_text(encoding="ascii")) / os.sysconf("SC_CLK_TCK")


def _own_seconds() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system
