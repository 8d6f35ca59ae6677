"""The native load generator (`bench/load_generator`) and what its lines mean: rates, gaps between tokens, first tokens.

It is built by cargo when it is first used. A gap is the time between two events of one stream; a server that sends two
tokens in one event has one gap for them. Failed requests end the run: a rate beside failures is no rate. O(events).
"""

from __future__ import annotations

import functools
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from bench.statistics import percentile

_SOURCES = Path(__file__).parent / "load_generator"
_TARGET = Path(__file__).parent.parent / "target" / "load-generator"
MAX_SECONDS = 600


class LoadFailed(RuntimeError):
    """A request failed, or none came to its end."""


@dataclass(frozen=True, slots=True)
class Request:
    """One request in seconds on the generator's clock; `events` are arrivals of text."""

    is_long: bool
    start: float
    end: float
    tokens: int
    events: tuple[float, ...]

    @property
    def first_token_seconds(self) -> float:
        """From sending to the first event."""
        return (self.events[0] if self.events else self.end) - self.start


@dataclass(frozen=True, slots=True)
class Load:
    """The requests of one run; what counts lies in (start, end] of the window."""

    start: float
    end: float
    requests: tuple[Request, ...]

    @property
    def requests_per_second(self) -> float:
        """Of those that ended in the window."""
        return sum(self._counts(request.end) for request in self._short()) / (self.end - self.start)

    @property
    def tokens_per_second(self) -> float:
        """Of short requests: tokens of those that ended count by the share of their events in the window."""
        inside = 0.0
        for request in self._short():
            if request.events:
                share = sum(map(self._counts, request.events)) / len(request.events)
                inside += request.tokens * share
        return inside / (self.end - self.start)

    def gaps(self) -> list[float]:
        """Seconds between neighbouring events of short requests whose second lies in the window."""
        pairs = (pair for request in self._short() for pair in zip(request.events, request.events[1:], strict=False))
        return [right - left for left, right in pairs if self._counts(right)]

    def gap_ms(self, percent: float) -> float:
        """A percentile of the gaps."""
        return 1e3 * percentile(self.gaps(), percent)

    def first_token_ms(self, percent: float, *, of_long: bool = False) -> float:
        """A percentile over all requests of one kind."""
        times = [request.first_token_seconds for request in self.requests if request.is_long == of_long]
        return 1e3 * percentile(times, percent)

    def round_trip_ms(self) -> float:
        """The median time of a whole request."""
        return 1e3 * percentile([request.end - request.start for request in self._short()], 50)

    def _short(self) -> Iterable[Request]:
        return (request for request in self.requests if not request.is_long)

    def _counts(self, at: float) -> bool:
        return self.start < at <= self.end


@functools.cache
def program() -> str:
    """Builds the generator if that was not done yet."""
    command = ["cargo", "build", "--release", "--quiet", "--locked", "--target-dir", str(_TARGET)]
    command += ["--manifest-path", str(_SOURCES / "Cargo.toml")]
    subprocess.run(command, check=True, timeout=MAX_SECONDS)
    return str(_TARGET / "release/llmscale-bench-load-generator")


def load(port: int, model: str, vocabulary: int, seed: int, **options: int) -> Load:
    """One run against a server on loopback; `options` as the generator has them. Raises LoadFailed."""
    words = {"address": f"127.0.0.1:{port}", "model": model, "vocabulary": vocabulary, "seed": seed, **options}
    command = [program(), *(f"{name}={value}" for name, value in words.items())]
    done = subprocess.run(command, capture_output=True, text=True, timeout=MAX_SECONDS, check=False)
    if done.returncode != 0:
        raise LoadFailed(f"the load generator ended with code {done.returncode}: {done.stderr[-500:]}")
    return parse(done.stdout)


def parse(text: str) -> Load:
    """Of the generator's output. Raises LoadFailed for a request that failed, and where there is none."""
    head, *lines = text.splitlines()
    start, end = (int(word) / 1e6 for word in head.split()[1:])
    requests = []
    for line in lines:
        kind, *words = line.split()
        if words[2] == "error":
            raise LoadFailed(f"a {kind} request failed: {' '.join(words[3:])}")
        begin, finish, tokens, *events = map(int, words)
        times = tuple(event / 1e6 for event in events)
        requests.append(Request(kind == "long", begin / 1e6, finish / 1e6, tokens, times))
    if not requests:
        raise LoadFailed("no request came to its end")
    return Load(start, end, tuple(requests))
