"""Requests in time: from a trace or drawn from a distribution, as arrivals with lengths in tokens.

Reads `t_ms,prompt_tokens,output_tokens` tables (.csv, .csv.gz) and Mooncake traces (.jsonl, .jsonl.gz: timestamp in ms,
input_length, output_length). O(requests). Knows nothing of servers; contents of prompts are drawn elsewhere.
"""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import json
import random
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path


class InvalidTrace(ValueError):
    """A trace that cannot be read, with its line."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request: when it arrives, in seconds since the first, and its lengths."""

    at_seconds: float
    prompt_tokens: int
    output_tokens: int


def load_trace(path: Path, *, max_requests: int | None = None, speed: float = 1.0) -> list[Arrival]:
    """The first requests of a trace in order of arrival, its time divided by `speed`. Raises InvalidTrace."""
    if not speed > 0:
        raise InvalidTrace(f"speed is {speed}, it must be above 0")
    with path.open("rb") as packed, ExitStack() as stack:
        plain = stack.enter_context(gzip.open(packed)) if path.suffix == ".gz" else packed
        lines = io.TextIOWrapper(plain, encoding="utf-8")
        rows = _jsonl(lines, path) if ".jsonl" in path.name else _table(lines, path)
        found = sorted(itertools.islice(rows, max_requests), key=lambda arrival: arrival.at_seconds)
    if not found:
        raise InvalidTrace(f"{path} holds no requests")
    first = found[0].at_seconds
    return [replace(arrival, at_seconds=(arrival.at_seconds - first) / speed) for arrival in found]


def poisson(rate: float, seconds: float, prompt_tokens: int, output_tokens: int, seed: int) -> list[Arrival]:
    """Independent arrivals at `rate` per second; lengths are drawn from exponentials with these means, at least 1."""
    if not (rate > 0 and seconds > 0 and prompt_tokens > 0 and output_tokens > 0):
        raise ValueError("rate, seconds and mean lengths must be above 0")
    draw = random.Random(seed)
    found = []
    at = draw.expovariate(rate)
    while at < seconds:
        lengths = (max(1, round(draw.expovariate(1 / mean))) for mean in (prompt_tokens, output_tokens))
        found.append(Arrival(at, *lengths))
        at += draw.expovariate(rate)
    return found


def fit(arrivals: Iterable[Arrival], max_sequence_tokens: int) -> tuple[list[Arrival], int]:
    """The same arrivals with lengths that a model can take, and how many had to be cut: prompts first."""
    fitted, cut = [], 0
    for arrival in arrivals:
        output = min(arrival.output_tokens, max_sequence_tokens // 2)
        prompt = min(arrival.prompt_tokens, max_sequence_tokens - output)
        cut += (output, prompt) != (arrival.output_tokens, arrival.prompt_tokens)
        fitted.append(Arrival(arrival.at_seconds, prompt, output))
    return fitted, cut


def _table(lines: Iterable[str], path: Path) -> Iterator[Arrival]:
    reader = csv.DictReader(lines)
    for number, row in enumerate(reader, start=2):
        yield _arrival(row, ("t_ms", "prompt_tokens", "output_tokens"), path, number)


def _jsonl(lines: Iterable[str], path: Path) -> Iterator[Arrival]:
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError as error:
                raise InvalidTrace(f"{path}:{number} is not JSON: {error}") from error
            yield _arrival(row, ("timestamp", "input_length", "output_length"), path, number)


def _arrival(row: object, names: tuple[str, str, str], path: Path, number: int) -> Arrival:
    try:
        assert isinstance(row, dict)
        at_ms, prompt, output = (float(row[name]) for name in names)
    except (AssertionError, KeyError, TypeError, ValueError) as error:
        raise InvalidTrace(f"{path}:{number} needs numbers in {', '.join(names)}") from error
    if at_ms < 0 or prompt < 1 or output < 1:
        raise InvalidTrace(f"{path}:{number} has a negative time or a length below 1 token")
    return Arrival(at_ms / 1e3, int(prompt), int(output))
