"""Lines of a log: one event each, as JSON or for a terminal, whatever its fields hold."""

from __future__ import annotations

import io
import json
import logging
import sys
from datetime import datetime
from pathlib import Path

import pytest

from llmscale.logs import JsonFormatter, TextFormatter, configure, get_logger
from tests.captured_logs import captured_logs


def one_line(formatter: logging.Formatter, level: int, event: str, **fields: object) -> str:
    """What a logger of its own writes."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(formatter)
    logger = logging.getLogger("llmscale.test-of-lines")
    logger.propagate, logger.handlers = False, [handler]
    logger.setLevel(logging.INFO)
    said = get_logger("llmscale.test-of-lines")
    {logging.INFO: said.info, logging.WARNING: said.warning, logging.ERROR: said.error}[level](event, **fields)
    return stream.getvalue()


def test_an_event_is_an_object_with_its_fields_and_the_time() -> None:
    line = json.loads(one_line(JsonFormatter(), logging.WARNING, "worker died", epoch=3, how="signal 9", said=None))
    when = datetime.fromisoformat(line.pop("timestamp"))
    assert line == {"epoch": 3, "how": "signal 9", "said": None, "event": "worker died", "level": "warning"}
    assert when.tzinfo is not None


def test_a_field_that_is_no_json_is_shown_and_breaks_nothing() -> None:
    line = json.loads(one_line(JsonFormatter(), logging.INFO, "it is here", where=Path("/here")))
    assert line["where"] == "PosixPath('/here')"


def test_a_terminal_gets_one_line_whatever_the_fields_hold() -> None:
    text = one_line(TextFormatter(colours=False), logging.ERROR, "it failed", reason="two\nlines", code="a", empty="")
    assert text.count("\n") == 1
    assert text.endswith(" error    it failed reason='two\\nlines' code=a empty=''\n")
    assert "\x1b[31merror" in one_line(TextFormatter(colours=True), logging.ERROR, "it failed")


def test_arguments_are_formatted_into_the_event_and_an_exception_comes_with_its_traceback() -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter())
    logger = logging.getLogger("llmscale.test-of-tracebacks")
    logger.propagate, logger.handlers = False, [handler]
    try:
        int("no step")
    except ValueError:
        get_logger("llmscale.test-of-tracebacks").exception("%s steps raised", 2)
    line = json.loads(stream.getvalue())
    assert (line["event"], line["level"]) == ("2 steps raised", "error")
    assert line["exception"].endswith("ValueError: invalid literal for int() with base 10: 'no step'")


def test_other_libraries_events_come_the_same_way(monkeypatch: pytest.MonkeyPatch) -> None:
    root = logging.getLogger()
    before = (root.handlers, root.level)
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("LLMSCALE_LOG_FORMAT", "json")
    try:
        configure()
        logging.getLogger("someone").warning("beware of %s", "it")
        get_logger("llmscale.test").info("here", a=1)
    finally:
        root.handlers, _ = before
        root.setLevel(before[1])
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [(line["event"], line["level"], line.get("a")) for line in lines] == [
        ("beware of it", "warning", None),
        ("here", "info", 1),
    ]


def test_a_test_sees_events_with_their_fields() -> None:
    with captured_logs() as said:
        get_logger("llmscale.test").info("here", a=1)
    get_logger("llmscale.test").info("not here")
    assert said == [{"a": 1, "event": "here", "log_level": "info"}]
