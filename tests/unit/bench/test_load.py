"""The loops that drive a server, in virtual time."""

import asyncio
import heapq
import itertools

import pytest

from bench.load import Objectives, Outcome, closed_loop, open_loop, summarize
from bench.workload import Arrival


class VirtualTime:
    """A clock that jumps to the next sleeper when everybody waits."""

    def __init__(self):
        self.now = 0.0
        self._sleepers = []
        self._order = itertools.count()

    def clock(self):
        return self.now

    async def sleep(self, seconds):
        wake = asyncio.get_running_loop().create_future()
        heapq.heappush(self._sleepers, (self.now + seconds, next(self._order), wake))
        await wake

    async def run(self, coroutine):
        task = asyncio.ensure_future(coroutine)
        while not task.done():
            # Enough turns for every ready task to reach its next wait.
            for _ in range(20):
                await asyncio.sleep(0)
            if not task.done() and self._sleepers:
                self.now, _, wake = heapq.heappop(self._sleepers)
                wake.set_result(None)
        return task.result()


def server(time, service_seconds):
    """One request at a time, each so long."""
    busy = asyncio.Lock()

    async def send(arrival, outcome):
        async with busy:
            await time.sleep(service_seconds)
            outcome.pieces.append(time.now)
            outcome.output_tokens = arrival.output_tokens

    return send


async def test_requests_start_when_they_are_due_however_slow_the_server_is():
    time = VirtualTime()
    started = []

    async def send(arrival, outcome):
        started.append(time.now)
        await time.sleep(100)

    await time.run(open_loop([Arrival(at, 1, 1) for at in (0, 1, 5)], send, time.clock, time.sleep))
    assert started == [0, 1, 5]


async def test_waiting_behind_others_counts_from_when_a_request_was_due():
    time = VirtualTime()
    arrivals = [Arrival(at, 1, 1) for at in range(4)]
    outcomes = await time.run(open_loop(arrivals, server(time, 3), time.clock, time.sleep))
    assert [outcome.first_token_seconds for outcome in outcomes] == [3, 5, 7, 9]


async def test_a_client_that_is_late_does_not_shift_what_was_due():
    time = VirtualTime()

    async def late_sleep(seconds):
        await time.sleep(seconds + 2)

    outcomes = await time.run(open_loop([Arrival(0, 1, 1), Arrival(1, 1, 1)], server(time, 1), time.clock, late_sleep))
    assert [outcome.due for outcome in outcomes] == [0, 1]
    assert outcomes[1].first_token_seconds == 3


async def test_a_closed_loop_keeps_its_streams_busy_and_no_more():
    time = VirtualTime()
    running, most = 0, 0

    async def send(arrival, outcome):
        nonlocal running, most
        running += 1
        most = max(most, running)
        await time.sleep(1)
        running -= 1

    outcomes = await time.run(closed_loop([Arrival(0, 1, 1)] * 10, send, time.clock, 4))
    assert (len(outcomes), most, time.now) == (10, 4, 3)


def outcome(due, first, end, tokens, error=None):
    return Outcome(due, [first], end, tokens, error)


def test_goodput_counts_failures_and_misses_against_all():
    outcomes = [
        outcome(0, 0.1, 1.1, 11),
        outcome(0, 2, 3, 11),
        outcome(0, 0.1, 9, 11),
        outcome(0, 0.1, 0.2, 0, "HTTP 500"),
    ]
    found = summarize(outcomes, Objectives(first_token_seconds=1, token_seconds=0.2))
    assert found["goodput_share"] == 0.25
    assert found["errors"] == 1
    assert found["requests_per_second"] == pytest.approx(3 / 9)
    assert found["tokens_per_second"] == pytest.approx(33 / 9)
    assert found["first_token_ms_p50"] == pytest.approx(100)
    assert found["token_ms_p50"] == pytest.approx(100)


def test_a_run_that_failed_whole_has_no_times():
    found = summarize([outcome(0, 1, 1, 0, "x")], Objectives(1, 1))
    assert found["goodput_share"] == 0
    assert "first_token_ms_p50" not in found
