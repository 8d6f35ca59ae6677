"""One client's conversation with one node, without input or output: who greeted, what runs, what has arrived.

The driver feeds frames, link changes and the time, sends what `outgoing` holds and takes deliveries, at most one per
request and visit; O(rows) per frame. Greets every 100 ms until it is welcome, pings every second, drops frames of dead
workers by their epoch and checks that tokens come in order, so that a stream is complete or fails with a typed error.
Knows nothing of sockets, of text or of event loops.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from llmscale import errors
from llmscale.client import wire

GREETING_SECONDS: Final = 0.1
PING_SECONDS: Final = 1.0
# A node reports every 250 ms; one that is silent for 5 s is stuck, even if its connection stands.
MAX_SILENCE_SECONDS: Final = 5.0
_ATTEMPT: Final = 1


@dataclass(slots=True)
class Delivery:
    """What is new of one request. `failure` is set when it can never end well."""

    request: int
    index: int
    tokens: list[int] = field(default_factory=list)
    logprobs: list[tuple[float, list[tuple[int, float]]]] | None = None
    finish_reason: str | None = None
    cached_tokens: int = 0
    output_tokens: int = 0
    restarts: int = 0
    failure: errors.LlmscaleError | None = None


@dataclass(slots=True)
class _Live:
    output_tokens: int = 0
    cached_tokens: int = 0
    restarts: int = 0


class NodeSession:
    """See the module's text. Times are monotonic seconds and never go back."""

    def __init__(self, *, name: str, fleet: str) -> None:
        self._name = name
        self._fleet = fleet
        self._linked = False
        self._next_request = 1
        self._nonce = 0
        self._greet_at = 0.0
        self._ping_at = 0.0
        self._heard_at = 0.0
        self._epoch = 0
        self._live: dict[int, _Live] = {}
        self._news: dict[int, Delivery] = {}
        self.outgoing: list[bytes] = []
        self.welcome: wire.Welcome | None = None
        self.status: wire.Status | None = None
        self.refusal: errors.LlmscaleError | None = None
        """Why the node does not want this client; None while that is open or after it was welcomed."""

    @property
    def live_requests(self) -> int:
        """Requests that have not ended."""
        return len(self._live)

    # What the driver reports.

    def link_up(self, now: float) -> None:
        """The connection stands: it is time to greet."""
        self._linked = True
        self._greet_at = now
        self.tick(now)

    def link_down(self, reason: str) -> None:
        """The connection is lost, and with it everything that ran over it."""
        self._linked = False
        self._lose(errors.TransportError(reason))

    def greet_now(self, now: float) -> None:
        """Somebody waits for a welcome: greets at once."""
        self.refusal = None
        if self.welcome is None:
            self._greet_at = now
            self.tick(now)

    def tick(self, now: float) -> None:
        """Greets, pings and notices silence when it is time."""
        if not self._linked:
            return
        if self.welcome is None:
            if now >= self._greet_at:
                self._greet_at = now + GREETING_SECONDS
                self.outgoing.append(wire.hello(self._name, self._fleet, None))
            return
        if now - self._heard_at > MAX_SILENCE_SECONDS:
            self._lose(errors.TransportError(f"the node has said nothing for {MAX_SILENCE_SECONDS:g} s"))
            self._greet_at = now
        elif now >= self._ping_at:
            self._ping_at = now + PING_SECONDS
            self._nonce += 1
            self.outgoing.append(wire.ping(self._nonce))

    def next_due(self) -> float | None:
        """When `tick` has something to do; None while there is no connection."""
        if not self._linked:
            return None
        if self.welcome is None:
            return self._greet_at
        return min(self._ping_at, self._heard_at + MAX_SILENCE_SECONDS + 0.001)

    def receive(self, frame: bytes, now: float) -> None:
        """Takes a frame. One that cannot be read costs the conversation, which then starts over."""
        try:
            message = wire.decode(frame)
        except errors.TransportError as error:
            self._lose(error)
            return
        if isinstance(message, wire.Welcome):
            self._welcomed(message, now)
        elif isinstance(message, wire.Rejected):
            self._rejected(message)
        elif isinstance(message, wire.KvChanges | wire.KvSnapshot):
            self._lose(errors.TransportError("the node told of its cache, which this client has not asked for"))
        elif self.welcome is not None:
            self._heard(message, now)

    # What the client wants.

    def submit(
        self,
        prompt: Sequence[int],
        sampling: tuple[Any, ...],
        *,
        namespace: bytes,
        priority: str,
        remaining_us: int | None,
    ) -> int:
        """Starts a request and returns its number. The node must have welcomed this client."""
        assert self.welcome is not None, "a request needs a node"
        request, self._next_request = self._next_request, self._next_request + 1
        frame = wire.submit(
            request,
            _ATTEMPT,
            namespace=namespace,
            priority=priority,
            prompt=prompt,
            sampling=sampling,
            remaining_us=remaining_us,
        )
        if len(frame) > wire.MAX_FRAME_BYTES:
            raise errors.RequestTooLong(
                f"the request takes {len(frame)} bytes on the wire, the limit is {wire.MAX_FRAME_BYTES};"
                " shorten the prompt",
                field="prompt",
            )
        self._live[request] = _Live()
        self.outgoing.append(frame)
        return request

    def abort(self, request: int, at_token: int | None = None) -> None:
        """Ends a request; nothing more is delivered for it. One that has ended is no error."""
        self._news.pop(request, None)
        if self._live.pop(request, None) is not None and self.welcome is not None:
            self.outgoing.append(wire.abort(request, _ATTEMPT, at_token))

    def leave(self) -> None:
        """Says goodbye: the node drops what still runs."""
        if self.welcome is not None:
            self.outgoing.append(wire.goodbye())
        self.link_down("the client was closed")

    def take(self) -> list[Delivery]:
        """What is new, at most one delivery per request, tokens in order."""
        if not self._news:
            return []
        taken = list(self._news.values())
        self._news.clear()
        return taken

    # Frames.

    def _welcomed(self, welcome: wire.Welcome, now: float) -> None:
        if welcome.version != wire.VERSION:
            self._lose(errors.TransportError(f"the node wants version {welcome.version} of the protocol"))
            return
        if self.welcome is not None and self.welcome.node != welcome.node:
            self._lose(errors.TransportError("the node was started again; its requests are gone"))
        # A greeting that crossed with its answer is answered twice: requests sent in between are still there.
        self.welcome, self.refusal = welcome, None
        self._epoch = max(self._epoch, welcome.epoch) if self._live else welcome.epoch
        self._heard_at = now
        self._ping_at = now + PING_SECONDS

    def _rejected(self, rejected: wire.Rejected) -> None:
        code = wire.REJECTIONS[rejected.code]
        text = f"the node refused the connection: {rejected.message}"
        if code == "not_greeted":
            self._lose(errors.TransportError("the node has given this client up, because it was silent for too long"))
            return
        kinds: dict[str, type[errors.LlmscaleError]] = {
            "wrong_fleet": errors.ConfigError,
            "wrong_model": errors.UnknownModel,
            "too_many_fronts": errors.Unavailable,
        }
        self.refusal = kinds.get(code, errors.TransportError)(text)
        self._lose(self.refusal)

    def _heard(self, message: wire.Outputs | wire.GiveBack | wire.Status | wire.Pong, now: float) -> None:
        assert self.welcome is not None
        if message.node != self.welcome.node:
            self._lose(errors.TransportError("the node was started again; its requests are gone"))
            return
        self._heard_at = now
        if message.epoch < self._epoch:
            return
        if message.epoch > self._epoch:
            # A worker died and the node goes on with the next one: streams that had begun survived that.
            self._epoch = message.epoch
            for live in self._live.values():
                live.restarts += live.output_tokens > 0
        if isinstance(message, wire.Outputs):
            self._outputs(message.columns)
        elif isinstance(message, wire.GiveBack):
            self._given_back(message)
        elif isinstance(message, wire.Status):
            self.status = message

    def _outputs(self, columns: wire.Columns) -> None:
        logprobs = dict(columns.logprobs) if columns.logprobs else None
        cached = dict(columns.cached)
        rows = zip(columns.requests, columns.attempts, columns.indexes, columns.tokens, strict=True)
        live_of, news = self._live, self._news
        for row, (request, attempt, index, token) in enumerate(rows):
            live = live_of.get(request)
            if live is None or attempt != _ATTEMPT or index < live.output_tokens:
                continue
            if index > live.output_tokens:
                self._fail(request, self._gap(live.output_tokens, index))
                continue
            if row in cached:
                live.cached_tokens = cached[row]
            delivery = news.get(request)
            if delivery is None:
                delivery = self._delivery(request, live)
            delivery.tokens.append(token)
            live.output_tokens += 1
            if logprobs is not None and row in logprobs:
                values = logprobs[row]
                if delivery.logprobs is None:
                    delivery.logprobs = []
                delivery.logprobs.append((values.chosen, values.top))
        for end in columns.finished:
            self._finished(end)

    def _finished(self, end: wire.Finished) -> None:
        live = self._live.get(end.request)
        if live is None or end.attempt != _ATTEMPT:
            return
        if live.output_tokens != end.output_tokens:
            self._fail(end.request, self._gap(live.output_tokens, end.output_tokens))
            return
        del self._live[end.request]
        delivery = self._delivery(end.request, live)
        delivery.finish_reason = wire.FINISH_REASONS[end.reason]
        delivery.output_tokens = end.output_tokens

    def _given_back(self, message: wire.GiveBack) -> None:
        live = self._live.get(message.request)
        if live is None or message.attempt != _ATTEMPT:
            return
        del self._live[message.request]
        self._delivery(message.request, live).failure = refusal_error(message.refusal)

    def _delivery(self, request: int, live: _Live) -> Delivery:
        known = Delivery(request, live.output_tokens, cached_tokens=live.cached_tokens, restarts=live.restarts)
        return self._news.setdefault(request, known)

    def _gap(self, expected: int, given: int) -> errors.TransportError:
        return errors.TransportError(f"tokens were lost on the way: {expected} arrived, the node is at {given}")

    def _fail(self, request: int, error: errors.LlmscaleError) -> None:
        live = self._live.pop(request)
        self.outgoing.append(wire.abort(request, _ATTEMPT, None))
        self._delivery(request, live).failure = error

    def _lose(self, error: errors.LlmscaleError) -> None:
        self.welcome = self.status = None
        for request, live in self._live.items():
            self._delivery(request, live).failure = error
        self._live.clear()


def refusal_error(refusal: Sequence[int] | None) -> errors.LlmscaleError:
    """The error of an attempt that came back: a code, then the numbers of that code."""
    error: errors.LlmscaleError
    match refusal:
        case [0, queued, limit, unit, retry_after_us] if unit < len(wire.QUEUE_UNITS):
            text = f"the node has {queued} {wire.QUEUE_UNITS[unit]} waiting, the limit is {limit}; retry later"
            error = errors.Overloaded(text, retry_after_seconds=retry_after_us / 1e6)
        case [1, needed, limit]:
            text = f"the request needs {needed}"
            error = errors.RequestTooLong.beyond(limit, text, "shorten the prompt or lower max_tokens")
        case [2]:
            error = errors.InvalidField("prompt has no tokens, at least 1 is needed", field="prompt")
        case [3, given, limit]:
            text = f"the request has the token id {given}, the vocabulary is {limit}"
            error = errors.InvalidField(text, field="prompt")
        case [4]:
            error = errors.InvalidField("the node refused the sampling parameters", field="sampling_params")
        case None | [6]:
            error = errors.Unavailable("the node is draining and takes no new requests; ask another one")
        case _:
            error = errors.TransportError(f"the node refused the request for a reason that is not known: {refusal}")
    return error
