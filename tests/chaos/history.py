"""What clients saw, and whether it can be what one undisturbed machine would have answered.

A history holds every event of every stream in the order in which its client met it. `faults` compares it with the
answers of an undisturbed run: every request ends exactly once, with exactly the reference's tokens, and its usage is
their count. O(tokens). It knows nothing of HTTP, of processes or of what was done to them.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

# So many tokens must agree again before a difference is called a loss or a repetition rather than a foreign token.
AGREEMENT_TOKENS = 4


class Kind(Enum):
    """What a client met."""

    SENT = "sent"
    TOKENS = "tokens"
    RESTART = "restart"
    FINISH = "finish"
    USAGE = "usage"
    DONE = "done"
    CLOSED = "closed"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Event:
    """One thing that one client met. `at` is in seconds on the monotonic clock."""

    request: int
    at: float
    kind: Kind
    tokens: tuple[str, ...] = ()
    text: str = ""
    count: int = 0


@dataclass(frozen=True, slots=True)
class Answer:
    """What a request must come to."""

    tokens: tuple[str, ...]
    text: str
    reason: str


class History:
    """Events of many clients. Any thread may record; a request's own events come from one thread."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._events: list[Event] = []
        self._answers: dict[int, int] = {}

    def send(self, request: int, answer: int) -> None:
        """A request is about to be sent; it must come to the reference's answer of this number."""
        with self._lock:
            assert request not in self._answers, f"request {request} was sent before"
            self._answers[request] = answer
        self.record(request, Kind.SENT)

    def record(self, request: int, kind: Kind, *, tokens: Sequence[str] = (), text: str = "", count: int = 0) -> None:
        """Something has just been met."""
        event = Event(request, self._clock(), kind, tuple(tokens), text, count)
        with self._lock:
            self._events.append(event)

    def events(self) -> list[Event]:
        """All so far, in order."""
        with self._lock:
            return list(self._events)

    def by_request(self) -> dict[int, list[Event]]:
        """The events of each request, in order."""
        found: dict[int, list[Event]] = defaultdict(list)
        for event in self.events():
            found[event.request].append(event)
        return found

    def answer(self, request: int) -> Answer:
        """What a request came to, as far as it is known: what makes a reference of an undisturbed run."""
        events = self.by_request()[request]
        met = [event for event in events if event.kind is Kind.TOKENS]
        reasons = [event.text for event in events if event.kind is Kind.FINISH]
        tokens = tuple(token for event in met for token in event.tokens)
        return Answer(tokens, "".join(event.text for event in met), reasons[-1] if reasons else "")

    def expected(self, request: int, references: Mapping[int, Answer]) -> Answer:
        """What it should have come to."""
        return references[self._answers[request]]


def faults(history: History, references: Mapping[int, Answer]) -> list[str]:
    """Everything that no undisturbed machine would have done, one line each; empty if there is nothing."""
    found = []
    for request, events in sorted(history.by_request().items()):
        expected = history.expected(request, references)
        lines = [*_order(events), *_answer(history.answer(request), expected), *_usage(events)]
        found += [f"request {request}: {line}" for line in lines]
    return found


def _order(events: Sequence[Event]) -> list[str]:
    """The shape of one stream: sent, tokens, one finish, one usage, done, closed; nothing else and nothing twice."""
    found = [f"failed: {event.text}" for event in events if event.kind is Kind.FAILED]
    kinds = [event.kind for event in events]
    for kind in (Kind.SENT, Kind.FINISH, Kind.USAGE, Kind.DONE, Kind.CLOSED):
        if (count := kinds.count(kind)) != 1:
            found.append(f"{count} events of kind {kind.value!r}, there is one in every stream")
    allowed = [Kind.SENT, Kind.TOKENS, Kind.FINISH, Kind.USAGE, Kind.DONE, Kind.CLOSED]
    places = [allowed.index(kind) for kind in kinds if kind in allowed]
    for before, after in itertools.pairwise(places):
        if after < before:
            found.append(f"{allowed[after].value!r} comes after {allowed[before].value!r}")
    return found


def _usage(events: Sequence[Event]) -> list[str]:
    met = sum(len(event.tokens) for event in events if event.kind is Kind.TOKENS)
    said = [event.count for event in events if event.kind is Kind.USAGE]
    return [f"the usage says {count} tokens, {met} came" for count in said if count != met]


def _answer(met: Answer, expected: Answer) -> list[str]:
    found = []
    if met.tokens != expected.tokens:
        found.append(_difference(met.tokens, expected.tokens))
    elif met.text != expected.text:
        found.append("the text differs though the tokens do not")
    if met.reason != expected.reason:
        found.append(f"finished by {met.reason!r}, the reference by {expected.reason!r}")
    return found


def _difference(met: Sequence[str], expected: Sequence[str]) -> str:
    """Where two answers part, and how."""
    at = next(
        (at for at, pair in enumerate(zip(met, expected, strict=False)) if pair[0] != pair[1]),
        min(len(met), len(expected)),
    )
    if at == len(met):
        return f"tokens lost at the end: {len(expected) - at} after token {at}"
    if at == len(expected):
        return f"tokens beyond the end: {len(met) - at} after token {at}"
    return f"{_how(met[at:], expected, at)} at token {at}: {met[at]!r} instead of {expected[at]!r}"


def _how(rest: Sequence[str], expected: Sequence[str], at: int) -> str:
    window = tuple(rest[:AGREEMENT_TOKENS])
    # The nearest place first: a story repeats itself, a fault mostly spans few tokens.
    for distance in range(1, len(expected) + 1):
        if tuple(expected[at + distance : at + distance + len(window)]) == window:
            return f"{distance} tokens lost"
        if distance <= at and tuple(expected[at - distance : at - distance + len(window)]) == window:
            return f"{distance} tokens doubled"
    if sorted(window) == sorted(expected[at : at + len(window)]):
        return "tokens reordered"
    return "a foreign token"


def gaps(history: History) -> dict[int, float]:
    """The longest time in seconds that each client waited between two events with tokens, of those that had two."""
    found = {}
    for request, events in history.by_request().items():
        times = [event.at for event in events if event.kind is Kind.TOKENS]
        if len(times) > 1:
            found[request] = max(after - before for before, after in itertools.pairwise(times))
    return found
