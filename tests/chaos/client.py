"""Clients that write down everything they meet: streams over HTTP, one thread each, into one history.

A client reads lines as they come and judges nothing: an error, a broken connection or an event that should not be there
is an entry like any other.
"""

from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx2

from tests.chaos.history import Answer, History, Kind, faults
from tests.processes import Server

Body = dict[str, Any]


def stream(server: Server, body: Body, history: History, request: int) -> None:
    """Streams one completion to its end, whatever that is."""
    wanted = {**body, "stream": True, "logprobs": 0, "stream_options": {"include_usage": True}}
    try:
        with server.client.stream("POST", server.base + "/v1/completions", json=wanted) as response:
            if response.status_code != 200:
                said = response.read().decode(errors="replace")
                history.record(request, Kind.FAILED, text=f"HTTP {response.status_code}: {said[:300]}")
                return
            for line in response.iter_lines():
                if line:
                    _meet(line, history, request)
        history.record(request, Kind.CLOSED)
    except httpx2.TransportError as error:
        history.record(request, Kind.FAILED, text=f"{type(error).__name__}: {error}")


def _meet(line: str, history: History, request: int) -> None:
    if line.startswith(": restarts "):
        history.record(request, Kind.RESTART, count=int(line.rpartition(" ")[2]))
        return
    if line.startswith(":"):
        return
    data = line.removeprefix("data: ")
    if data == "[DONE]":
        history.record(request, Kind.DONE)
        return
    event = json.loads(data)
    if "error" in event:
        history.record(request, Kind.FAILED, text=event["error"]["message"])
        return
    for choice in event["choices"]:
        tokens = () if choice["logprobs"] is None else choice["logprobs"]["tokens"]
        if tokens or choice["text"]:
            history.record(request, Kind.TOKENS, tokens=tokens, text=choice["text"])
        if choice["finish_reason"] is not None:
            history.record(request, Kind.FINISH, text=choice["finish_reason"])
    if event.get("usage") is not None:
        history.record(request, Kind.USAGE, count=event["usage"]["completion_tokens"])


def stream_all(server: Server, bodies: Sequence[Body], history: History) -> None:
    """Streams every body once, all at once; request and answer have the body's number."""
    with ThreadPoolExecutor(len(bodies)) as pool:
        for number in range(len(bodies)):
            history.send(number, number)
        running = [pool.submit(stream, server, body, history, number) for number, body in enumerate(bodies)]
    for done in running:
        done.result()


def undisturbed(server: Server, bodies: Sequence[Body]) -> dict[int, Answer]:
    """The reference: what every body comes to while nobody does anything to the fleet."""
    history = History()
    stream_all(server, bodies, history)
    answers = {number: history.answer(number) for number in range(len(bodies))}
    assert all(answer.tokens and answer.reason for answer in answers.values())
    assert faults(history, answers) == [], "nobody was disturbed"
    return answers


class Load:
    """A closed loop: so many streams at once, each with the next body, until it is told to stop."""

    def __init__(self, server: Server, bodies: Sequence[Body], history: History) -> None:
        self._server = server
        self._bodies = bodies
        self._history = history
        self._numbers = itertools.count()
        self._stopped = threading.Event()

    def _stream_on(self) -> None:
        while not self._stopped.is_set():
            request = next(self._numbers)
            body = request % len(self._bodies)
            self._history.send(request, body)
            stream(self._server, self._bodies[body], self._history, request)

    @contextmanager
    def running(self, streams: int) -> Iterator[Callable[[], None]]:
        """Runs until the block ends; then every stream that has begun goes on to its end. What is given looks whether
        the load still runs, and raises what a client raised."""
        with ThreadPoolExecutor(streams) as pool:
            loops: list[Future[None]] = [pool.submit(self._stream_on) for _ in range(streams)]

            def look() -> None:
                for loop in loops:
                    if loop.done():
                        loop.result()

            try:
                yield look
            finally:
                self._stopped.set()
        look()
