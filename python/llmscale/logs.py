"""How processes log: one line per event, text on a terminal and JSON elsewhere, to standard error. Prompts, outputs and
keys are never fields of an event.

An event is a sentence with named fields, handed to the standard library's logging, which is all that this needs: every
process of a server imports it, and a start waits for imports. What other libraries log becomes events without fields.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from datetime import UTC, datetime
from typing import Any

from llmscale import env

_FIELDS = "llmscale_fields"
_COLOURS = {"info": "32", "warning": "33", "error": "31", "critical": "31"}


class Logger:
    """The events of one part of a process; `arguments` are %-formatted into the event."""

    __slots__ = ("_logger",)

    def __init__(self, name: str) -> None:
        self._logger = logging.getLogger(name)

    def info(self, event: str, /, *arguments: object, **fields: object) -> None:
        """What an operator may want to know."""
        self._logger.info(event, *arguments, extra={_FIELDS: fields})

    def warning(self, event: str, /, *arguments: object, **fields: object) -> None:
        """What an operator should look at."""
        self._logger.warning(event, *arguments, extra={_FIELDS: fields})

    def error(self, event: str, /, *arguments: object, **fields: object) -> None:
        """What failed."""
        self._logger.error(event, *arguments, extra={_FIELDS: fields})

    def exception(self, event: str, /, *arguments: object, **fields: object) -> None:
        """The same, with the exception that is being handled and its traceback."""
        self._logger.error(event, *arguments, exc_info=True, extra={_FIELDS: fields})


def get_logger(name: str) -> Logger:
    """The logger of a part, such as "llmscale.node"."""
    return Logger(name)


def fields_of(record: logging.LogRecord) -> dict[str, Any]:
    """The named fields of an event; none of what another library logs."""
    fields: dict[str, Any] = getattr(record, _FIELDS, {})
    return fields


class JsonFormatter(logging.Formatter):
    """An object per line, which a log collector reads."""

    def format(self, record: logging.LogRecord) -> str:
        """See `logging.Formatter`."""
        said = {
            **fields_of(record),
            "event": record.getMessage(),
            "level": record.levelname.lower(),
            "timestamp": datetime.fromtimestamp(record.created, UTC).isoformat().replace("+00:00", "Z"),
        }
        if record.exc_info:
            said["exception"] = self.formatException(record.exc_info)
        return json.dumps(said, default=repr)


class TextFormatter(logging.Formatter):
    """A line for somebody who looks at a terminal."""

    def __init__(self, *, colours: bool) -> None:
        super().__init__()
        self._colours = colours

    def format(self, record: logging.LogRecord) -> str:
        """See `logging.Formatter`."""
        level = record.levelname.lower()
        shown = f"\x1b[{_COLOURS.get(level, '0')}m{level:8}\x1b[0m" if self._colours else f"{level:8}"
        fields = "".join(f" {name}={_shown(value)}" for name, value in fields_of(record).items())
        line = f"{time.strftime('%H:%M:%S', time.localtime(record.created))} {shown} {record.getMessage()}{fields}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


def configure() -> None:
    """Sets logging up for a process. Called once, by entry points only."""
    text = (env.LOG_FORMAT.read() or ("text" if sys.stderr.isatty() else "json")) == "text"
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(TextFormatter(colours=sys.stderr.isatty()) if text else JsonFormatter())
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.INFO)


def _shown(value: object) -> str:
    """As it stands where it is one word, else in quotes, so that a line stays one line."""
    text = str(value)
    return text if text.isprintable() and text and " " not in text else repr(text)
