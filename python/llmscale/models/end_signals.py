"""Signals that end a process by unwinding it, for commands that remove what they have half made.

The first one raises where the main thread is, and no other is heard while that removes things: a terminal, a service
manager and a parent may each send one. O(1). It does not know what is removed.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator

ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_UNHEARD = (signal.SIG_DFL, signal.default_int_handler)


@contextlib.contextmanager
def unwound_by_signals(*more: signal.Signals) -> Iterator[None]:
    """Within it SIGTERM, SIGHUP and `more` raise SystemExit, and SIGINT KeyboardInterrupt, once altogether.

    Signals that somebody ignores (nohup) or handles already are left alone, and so are all outside the main thread.
    """
    heard = [number for number in (*ENDING, *more) if signal.getsignal(number) in _UNHEARD]
    if threading.current_thread() is not threading.main_thread():
        heard = []
    before = {number: signal.getsignal(number) for number in heard}

    def end(number: int, _frame: object) -> None:
        for other in heard:
            signal.signal(other, signal.SIG_IGN)
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        # As a shell says it.
        raise SystemExit(128 + number)

    for number in heard:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
