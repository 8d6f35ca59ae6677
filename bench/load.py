"""Driving a server: an open loop that sends when a request is due, and a closed one that keeps N streams busy.

In the open loop every time counts from when a request was due, not from when it was sent, so a client or server that
falls behind cannot hide the wait of those behind it (coordinated omission). Time and sending are given, so the loops
run in virtual time too. Knows nothing of HTTP.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from bench.statistics import percentile
from bench.workload import Arrival

Clock = Callable[[], float]
Sleep = Callable[[float], Awaitable[None]]


@dataclass(slots=True)
class Outcome:
    """One request. Times are seconds on the loop's clock; `pieces` has one per event with text."""

    due: float
    pieces: list[float] = field(default_factory=list)
    end: float = 0.0
    output_tokens: int = 0
    error: str | None = None

    @property
    def first_token_seconds(self) -> float:
        """From when it was due to its first text, or to its end where no text came."""
        return (self.pieces[0] if self.pieces else self.end) - self.due

    @property
    def token_seconds(self) -> float | None:
        """Mean time per output token after the first; None for a single token."""
        if self.output_tokens < 2 or not self.pieces:
            return None
        return (self.end - self.pieces[0]) / (self.output_tokens - 1)


Send = Callable[[Arrival, Outcome], Awaitable[None]]
"""Sends a request and fills its outcome; a failure goes into `error`."""


async def open_loop(arrivals: Sequence[Arrival], send: Send, clock: Clock, sleep: Sleep) -> list[Outcome]:
    """Starts every request when it is due, however many are under way."""
    start = clock()
    outcomes = [Outcome(start + arrival.at_seconds) for arrival in arrivals]
    async with asyncio.TaskGroup() as group:
        for arrival, outcome in zip(arrivals, outcomes, strict=True):
            if (wait := outcome.due - clock()) > 0:
                await sleep(wait)
            group.create_task(_one(arrival, outcome, send, clock))
    return outcomes


async def closed_loop(arrivals: Sequence[Arrival], send: Send, clock: Clock, streams: int) -> list[Outcome]:
    """Keeps `streams` requests under way until all are done; each is due when its stream is free."""
    waiting = iter(arrivals)
    outcomes: list[Outcome] = []

    async def stream() -> None:
        for arrival in waiting:
            outcome = Outcome(clock())
            outcomes.append(outcome)
            await _one(arrival, outcome, send, clock)

    async with asyncio.TaskGroup() as group:
        for _ in range(streams):
            group.create_task(stream())
    return outcomes


async def _one(arrival: Arrival, outcome: Outcome, send: Send, clock: Clock) -> None:
    await send(arrival, outcome)
    outcome.end = clock()


@dataclass(frozen=True, slots=True)
class Objectives:
    """What a request must meet to count as good."""

    first_token_seconds: float
    token_seconds: float


def summarize(outcomes: Sequence[Outcome], objectives: Objectives) -> dict[str, float]:
    """Percentiles over the requests that ended well, rates over all, goodput by the objectives.

    Failures count in every rate as requests that gave nothing; there is at least one outcome.
    """
    well = [outcome for outcome in outcomes if outcome.error is None]
    seconds = max(outcome.end for outcome in outcomes) - min(outcome.due for outcome in outcomes)
    found = {
        "requests": float(len(outcomes)),
        "errors": float(len(outcomes) - len(well)),
        "requests_per_second": len(well) / seconds,
        "tokens_per_second": sum(outcome.output_tokens for outcome in well) / seconds,
        "goodput_share": sum(_is_good(outcome, objectives) for outcome in well) / len(outcomes),
    }
    columns = {
        "first_token_ms": [outcome.first_token_seconds for outcome in well],
        "token_ms": [value for outcome in well if (value := outcome.token_seconds) is not None],
        "whole_ms": [outcome.end - outcome.due for outcome in well],
    }
    for name, values in columns.items():
        for percent in (50, 90, 99) if values else ():
            found[f"{name}_p{percent}"] = percentile(values, percent) * 1e3
    return found


def _is_good(outcome: Outcome, objectives: Objectives) -> bool:
    per_token = outcome.token_seconds
    fast = per_token is None or per_token <= objectives.token_seconds
    return fast and outcome.first_token_seconds <= objectives.first_token_seconds
