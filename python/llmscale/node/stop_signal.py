"""What SIGTERM and SIGINT mean to a node: the first asks it to end in good order, a later one of the same kind at once.

A terminal and a service manager signal a whole group of processes, and the command above a node asks it too, after its
own drain, with a kind that nobody else sends (SIGUSR1): what comes together, and another kind, is the same wish. O(1)
per signal. Does not know what ending takes.
"""

from __future__ import annotations

import asyncio
import signal
import time

TOGETHER_SECONDS = 0.5


class StopSignal:
    """Two events, which are set once: `asked`, and `insisted`."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self.insisted = asyncio.Event()
        self._first: dict[signal.Signals, float] = {}

    @classmethod
    def listen(cls) -> StopSignal:
        """Hears this process's signals from now on, in the running loop."""
        stop = cls()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            loop.add_signal_handler(number, stop._hear_now, number)
        return stop

    def _hear_now(self, number: signal.Signals) -> None:
        self.hear(number, time.monotonic())

    def hear(self, number: signal.Signals, now: float) -> None:
        """A signal has come; `now` is in seconds."""
        self.asked.set()
        if now - self._first.setdefault(number, now) > TOGETHER_SECONDS:
            self.insisted.set()
