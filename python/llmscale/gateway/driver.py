"""Joins the front to the event loop.

One `FrontDriver` per process watches the front's eventfd, drains it once per wake-up and hands each delivery to its
choice in O(tokens), then wakes each touched reply once. It owns which request belongs to which reply and sees to it
that a reply that ends, fails or is abandoned leaves nothing running, and that all unsent answers together hold a
bounded memory. It knows nothing of HTTP, JSON or sockets.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any, Final

from llmscale.choice import ENDED_WELL, Choice, Delivery, failure
from llmscale.errors import LlmscaleError, Overloaded, Unavailable, UnknownModel
from llmscale.gateway.front import Front
from llmscale.gateway.http import trace_of
from llmscale.gateway.reply import Reply
from llmscale.logs import get_logger
from llmscale.metrics import RequestMetrics

MAX_HELD_BYTES: Final = 1 << 30
"""Of the log probabilities of all answers that are sent whole, of the prompts that all answers repeat, and of answers
that are texts or ids of a request."""
# A row of log probabilities takes so much, and as much again for each of its values: 112 and 184 bytes are measured.
_VALUE_BYTES: Final = 112
_log = get_logger("llmscale.gateway")


class FrontDriver:
    """All live requests of this process. Use from the event loop only."""

    def __init__(self, front: Front, loop: asyncio.AbstractEventLoop, max_request_seconds: float) -> None:
        self._front = front
        self._max_request_seconds = max_request_seconds
        self._loop = loop
        self._live: dict[int, tuple[Choice, Reply, RequestMetrics]] = {}
        self._replies: set[Reply] = set()
        self._held_bytes = 0
        self._closed = False
        loop.add_reader(front.fileno(), self._wake)

    @property
    def live_replies(self) -> int:
        """HTTP requests that wait for tokens."""
        return len(self._replies)

    def start(self, *, streaming: bool) -> Reply:
        """A reply without choices; `submit` adds them."""
        return Reply(self._loop, streaming=streaming)

    @property
    def held_bytes(self) -> int:
        """What unsent answers hold, as far as `MAX_HELD_BYTES` is about it."""
        return self._held_bytes

    def hold(self, reply: Reply, size_bytes: int) -> None:
        """Counts what an answer tells of prompts and ids, until it is abandoned. Raises `Overloaded`."""
        if size_bytes and self._held_bytes + size_bytes > MAX_HELD_BYTES:
            raise Overloaded(
                f"answers that are not sent yet hold {self._held_bytes} bytes, with the {size_bytes} of this one they"
                f" are more than {MAX_HELD_BYTES}; send less, leave echo out or retry later",
                retry_after_seconds=1.0,
            )
        self._held_bytes += size_bytes
        reply.held_bytes += size_bytes

    def submit(
        self,
        reply: Reply,
        choice: Choice,
        *,
        metrics: RequestMetrics,
        tenant: str,
        prompt: Sequence[int],
        sampling: Any,
        priority: str,
    ) -> None:
        """Starts one choice. When it is refused, the reply's other choices are cancelled and the error goes on."""
        if self._closed:
            raise Unavailable("this gateway is shutting down; retry on another one")
        try:
            choice.request = self._front.submit(
                tenant,
                metrics.model,
                prompt,
                sampling,
                priority=priority,
                timeout_us=int(self._max_request_seconds * 1e6),
                detached=False,
            )
        except UnknownModel as error:
            self.abandon(reply)
            # The front knows models by the nodes that it has seen; a 404 would say that nobody will ever serve it.
            raise Unavailable(
                f"no replica of {metrics.model} has been seen yet; retry in a moment, /fleet shows those that are there"
            ) from error
        except BaseException:
            self.abandon(reply)
            raise
        choice.started_at = time.monotonic()
        self._live[choice.request] = (choice, reply, metrics)
        self._replies.add(reply)
        reply.choices.append(choice)
        reply.remaining += 1

    def abandon(self, reply: Reply) -> None:
        """Cancels what still runs of a reply. Safe to call at any time, also twice."""
        self._held_bytes -= reply.held_bytes
        reply.held_bytes = 0
        for choice in reply.choices:
            entry = self._live.pop(choice.request, None) if choice.request is not None else None
            if entry is not None and choice.request is not None:
                self._front.cancel(choice.request)
                entry[2].finished(choice, "abort")
        self._replies.discard(reply)

    def client_gone(self, reply: Reply) -> None:
        """The client closed its connection: nobody will read the answer."""
        reply.gone = True
        self.abandon(reply)
        reply.notify()

    def fail_all(self, error: LlmscaleError) -> None:
        """Ends every live reply with an error, so that its client learns why."""
        for reply in list(self._replies):
            reply.error = error
            self.abandon(reply)
            reply.notify()

    def refuse_new(self) -> None:
        """No new request is started from now on."""
        self._closed = True

    def close(self) -> None:
        """Stops watching the front and cancels everything."""
        self._closed = True
        self._loop.remove_reader(self._front.fileno())
        for reply in list(self._replies):
            self.client_gone(reply)

    def _wake(self) -> None:
        touched: list[Reply] = []
        live = self._live
        # Not the loop's time: uvloop's has a resolution of a millisecond.
        now = time.monotonic()
        for delivery in self._front.take():
            entry = live.get(delivery.request)
            # A request that was cancelled here may still have deliveries under way.
            if entry is not None:
                choice, reply, metrics = entry
                try:
                    self._accept(choice, reply, metrics, delivery, now)
                except Exception as error:  # noqa: BLE001 - logged and told to the client
                    # One stream's fault must not stop the others that are served by this loop.
                    _log.error("a delivery could not be processed", request=delivery.request, **trace_of(error))
                    reply.error = LlmscaleError("the gateway failed while it processed this request")
                    self.abandon(reply)
                touched.append(reply)
        for reply in touched:
            reply.notify()

    def _accept(self, choice: Choice, reply: Reply, metrics: RequestMetrics, delivery: Delivery, now: float) -> None:
        before = choice.output_tokens
        keep = choice.accept(delivery)
        metrics.tokens(choice, choice.output_tokens - before, now)
        if choice.logprobs and not reply.streaming:
            self._hold_rows(reply, choice, choice.output_tokens - before)
            if reply.error is not None:
                return
        reason = choice.finish_reason
        if reason is None:
            return
        del self._live[delivery.request]
        reply.remaining -= 1
        if delivery.finish_reason is None:
            # The gateway matched a stop string: the sequence is still running.
            self._front.cancel(delivery.request, at_token=keep)
        metrics.finished(choice, reason)
        if reason not in ENDED_WELL:
            reply.error = failure(reason, f"{self._max_request_seconds:g} s (max_request_seconds of the gateway)")
            self.abandon(reply)
        elif reply.remaining == 0:
            self._replies.discard(reply)

    def _hold_rows(self, reply: Reply, choice: Choice, rows: int) -> None:
        """Counts new log probabilities. Where all are too many, the answer that holds the most ends."""
        size = rows * (2 + len(choice.logprobs[-1][2])) * _VALUE_BYTES
        self._held_bytes += size
        reply.held_bytes += size
        if self._held_bytes <= MAX_HELD_BYTES:
            return
        largest = max(self._replies, key=lambda live: live.held_bytes)
        largest.error = Overloaded(
            f"answers that are not sent yet hold {self._held_bytes} bytes of log probabilities, the limit is"
            f" {MAX_HELD_BYTES}; this one held the most, {largest.held_bytes}: stream it, or ask for fewer",
            retry_after_seconds=10.0,
        )
        self.abandon(largest)
        largest.notify()
