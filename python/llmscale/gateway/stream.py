"""Server-sent events: writes one reply while it grows.

A stream wakes once per wake-up of the front and writes everything that is new in one piece. While its client reads
slowly the text waits unframed in the choices, so waiting costs its characters only; a client that takes nothing for too
long, or lets too much wait, is evicted and its requests are cancelled. One timer for all streams (O(streams) per
second) finds idle and stalled ones. Knows nothing of the JSON inside an event.
"""

from __future__ import annotations

import asyncio
from typing import Final

from llmscale.gateway import connection
from llmscale.gateway.answers import DONE, Format
from llmscale.gateway.config import GatewayLimits
from llmscale.gateway.http import Exchange, error_body
from llmscale.gateway.reply import Reply
from llmscale.logs import get_logger
from llmscale.metrics import GatewayMetrics

_log = get_logger("llmscale.gateway")
_HEADERS: Final = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
)
_PING: Final = b": ping\n\n"
_SWEEP_SECONDS: Final = 1.0


class EventStream:
    """One streamed response."""

    __slots__ = (
        "_began",
        "_exchange",
        "_format",
        "_limits",
        "_loop",
        "_reply",
        "_restarts",
        "_task",
        "evicted",
        "writing",
        "written_at",
    )

    def __init__(self, exchange: Exchange, reply: Reply, form: Format, limits: GatewayLimits) -> None:
        self._exchange = exchange
        self._reply = reply
        self._format = form
        self._limits = limits
        self._loop = asyncio.get_running_loop()
        self._task = asyncio.current_task()
        self._began: set[int] = set()
        self._restarts = 0
        self.written_at = self._loop.time()
        self.writing = False
        self.evicted = False

    async def run(self) -> None:
        """Writes until the reply has finished or nobody reads."""
        reply = self._reply
        while True:
            await reply.wait()
            if reply.gone:
                return
            if reply.error is not None and not self._exchange.started:
                # Nothing was sent yet, so the status can still tell the truth.
                await self._exchange.fail(reply.error)
                return
            finished = reply.finished
            news = self._news()
            if finished:
                await self._write(news + self._end(), more=False)
                return
            if news:
                await self._write(news, more=True)
            elif self._loop.time() - self.written_at >= self._limits.ping_seconds:
                await self._write(_PING, more=True)

    def look(self, now: float) -> None:
        """Called by the sweeper: pings when idle, evicts when the client has taken nothing for too long."""
        if not self.writing:
            if now - self.written_at >= self._limits.ping_seconds:
                self._reply.poke()
            return
        waiting = sum(choice.waiting_bytes for choice in self._reply.choices)
        stalled = now - self.written_at
        if stalled >= self._limits.max_stall_seconds or waiting > self._limits.max_stream_buffer_bytes:
            self.evict()

    def evict(self) -> None:
        """Ends the stream without asking the client."""
        self.evicted = True
        if self._task is not None:
            self._task.cancel()

    async def _write(self, data: bytes, *, more: bool) -> None:
        if not self._exchange.started:
            await self._exchange.start(200, _HEADERS)
        self.writing = True
        self.written_at = self._loop.time()
        await self._exchange.write(data, more=more)
        self.writing = False
        self.written_at = self._loop.time()

    def _news(self) -> bytes:
        form, began = self._format, self._began
        if form.continuous_usage:
            form.count(self._reply.usage())
        parts = []
        for choice in self._reply.choices:
            if choice.output_tokens and choice.index not in began:
                began.add(choice.index)
                parts.append(form.begin(choice))
            if choice.restarts > self._restarts:
                # A comment: clients ignore it, the chat page shows that the stream survived.
                self._restarts = choice.restarts
                parts.append(b": restarts %d\n\n" % choice.restarts)
            parts.append(form.news(choice))
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _end(self) -> bytes:
        reply = self._reply
        if reply.error is not None:
            return b"data: %b\n\n%b" % (error_body(reply.error), DONE)
        return self._format.usage(reply.usage()) + DONE if self._format.include_usage else DONE


class Sweeper:
    """Looks at every open stream once a second."""

    def __init__(self, metrics: GatewayMetrics, loop: asyncio.AbstractEventLoop) -> None:
        self._metrics = metrics
        self._loop = loop
        self._streams: set[EventStream] = set()
        self._timer: asyncio.TimerHandle | None = loop.call_later(_SWEEP_SECONDS, self._sweep)

    async def run(self, stream: EventStream, exchange: Exchange) -> None:
        """Runs a stream under supervision."""
        self._streams.add(stream)
        try:
            await stream.run()
        except asyncio.CancelledError:
            if not stream.evicted:
                raise
            self._metrics.evicted_readers += 1
            _log.warning("a stream was ended because its client did not read", request_id=exchange.request_id)
            connection.abort(exchange.scope)
            # The server notices the abort in the next turn of the loop, and complains about an unfinished answer
            # before.
            await asyncio.sleep(0)
        finally:
            self._streams.discard(stream)

    def close(self) -> None:
        """Stops the timer."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _sweep(self) -> None:
        now = self._loop.time()
        for stream in list(self._streams):
            stream.look(now)
        self._timer = self._loop.call_later(_SWEEP_SECONDS, self._sweep)
