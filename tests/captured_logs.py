"""What this process logs while a block runs."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from llmscale.logs import fields_of


class _Collector(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.events: list[dict[str, Any]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.events.append({**fields_of(record), "event": record.getMessage(), "log_level": record.levelname.lower()})


@contextmanager
def captured_logs() -> Iterator[list[dict[str, Any]]]:
    """Events from information upwards, each with its fields, `event` and `log_level`, in the order they came."""
    collector, root = _Collector(), logging.getLogger()
    before = root.level
    root.addHandler(collector)
    root.setLevel(logging.INFO)
    try:
        yield collector.events
    finally:
        root.removeHandler(collector)
        root.setLevel(before)
