"""A node directly over ZeroMQ: one DEALER socket that the event loop watches by its descriptor.

Each wake-up drains the socket, feeds the session and wakes each waiting answer once. The descriptor is read by the loop
itself, because `zmq.asyncio` makes a future and a poll per message: a burst of 100,000 frames of 60 bytes took 12.6 us
of CPU each, against 0.33 us this way. A monitor socket reports a lost or refused connection at once. Knows nothing of
msgpack or of text.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import socket as sockets
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

import zmq
from zmq.utils.monitor import parse_monitor_message

from llmscale import errors
from llmscale.client import wire
from llmscale.client.calls import Call
from llmscale.client.keys import CurveKeys
from llmscale.client.node_reply import NodeReply
from llmscale.client.results import Assembly, Health, ModelInfo, StreamChunk
from llmscale.client.session import Delivery, NodeSession

if TYPE_CHECKING:
    from llmscale.tokenizer import Tokenizer

# Frames taken per wake-up, so that one busy node cannot starve the application's other tasks.
_MAX_FRAMES_PER_WAKE_UP: Final = 256
_QUEUE_FRAMES: Final = 4_096
_GOODBYE_MS: Final = 200
_WATCHED: Final = (
    zmq.EVENT_HANDSHAKE_SUCCEEDED
    | zmq.EVENT_DISCONNECTED
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
)
_SOCKET_OPTIONS: Final = (
    # Not IMMEDIATE, which would keep frames from waiting for a node that is away: with it libzmq also drops what has
    # arrived and is unread once the connection ends, and the last tokens of a node that drains came just before that.
    (zmq.LINGER, 0),
    (zmq.SNDHWM, _QUEUE_FRAMES),
    (zmq.RCVHWM, _QUEUE_FRAMES),
    (zmq.MAXMSGSIZE, 2 * wire.MAX_FRAME_BYTES + 64),
    (zmq.HANDSHAKE_IVL, 5_000),
    (zmq.HEARTBEAT_IVL, 1_000),
    (zmq.HEARTBEAT_TIMEOUT, 10_000),
    (zmq.RECONNECT_IVL, 50),
    (zmq.RECONNECT_IVL_MAX, 2_000),
    (zmq.TCP_KEEPALIVE, 1),
)


class NodeAnswer:
    """One request on a node."""

    def __init__(self, transport: NodeTransport, reply: NodeReply, *, streaming: bool) -> None:
        self._transport = transport
        self._reply = reply
        self._streaming = streaming
        self._waiter: asyncio.Future[None] | None = None

    @property
    def assembly(self) -> Assembly:
        return self._reply.assembly

    async def next(self) -> list[StreamChunk]:
        while True:
            reply = self._reply
            if reply.finished or self._streaming:
                if chunks := reply.take():
                    return chunks
                if reply.error is not None:
                    raise reply.error
                if reply.finished:
                    return []
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None

    def cancel(self) -> None:
        if not self._reply.finished:
            self._reply.error = errors.Cancelled("the request was cancelled by this client")
        self._transport.forget(self._reply)
        self.wake()

    def wake(self) -> None:
        """Lets `next` look, if there is something for it to see."""
        waiter = self._waiter
        if waiter is not None and not waiter.done() and (self._streaming or self._reply.finished):
            waiter.set_result(None)


class NodeTransport:
    """A client's connection to one node. Opens with its first use, on the event loop of that use."""

    def __init__(
        self,
        address: str,
        *,
        keys: CurveKeys | None,
        fleet: str,
        tokenizer: Callable[[wire.Welcome], Tokenizer | None],
        connect_seconds: float,
    ) -> None:
        self._address = address
        self._keys = keys
        self._make_tokenizer = tokenizer
        self._tokenizer: Tokenizer | None = None
        self._tokenizer_of: bytes | None = None
        self._connect_seconds = connect_seconds
        # Cache entries are shared between the requests of this client and with nobody else.
        self._namespace = secrets.token_bytes(32)
        self._session = NodeSession(name=f"client-{sockets.gethostname()[:64]}-{os.getpid()}", fleet=fleet)
        self._answers: dict[int, NodeAnswer] = {}
        self._changed: list[asyncio.Future[None]] = []
        self._loop: asyncio.AbstractEventLoop | None = None
        self._context: zmq.Context[zmq.Socket[bytes]] | None = None
        self._socket: zmq.Socket[bytes] | None = None
        self._monitor: zmq.Socket[bytes] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._draining = False
        self._handshake_refused = False

    # What the client calls.

    async def start(self, call: Call) -> NodeAnswer:
        welcome = await self._welcome(call.timeout_seconds)
        if call.model is not None and call.model != welcome.model.name:
            raise errors.UnknownModel(f"this node serves {welcome.model.name!r}, not {call.model!r}", field="model")
        request_id = f"request-{secrets.token_hex(8)}"
        reply = NodeReply(call, welcome.limits, self._tokenizer_for(welcome), request_id)
        answer = NodeAnswer(self, reply, streaming=call.streaming)
        remaining_us = None if call.timeout_seconds is None else int(call.timeout_seconds * 1e6)
        for index in range(reply.params.n):
            request = self._session.submit(
                reply.prompt,
                reply.sampling(index),
                namespace=self._namespace,
                priority=call.priority,
                remaining_us=remaining_us,
            )
            reply.started(request, index)
            self._answers[request] = answer
        self._advance()
        return answer

    async def models(self) -> list[ModelInfo]:
        welcome = await self._welcome(None)
        return [ModelInfo(welcome.model.name, welcome.limits.max_sequence_tokens)]

    async def health(self) -> Health:
        await self._welcome(None)
        while (status := self._session.status) is None:
            await self._change()
            await self._welcome(None)
        return Health(wire.NODE_STATES[status.state], status.running, status.waiting, status.worker_restarts)

    async def close(self) -> None:
        if self._socket is None:
            return
        self._session.leave()
        # Time for the goodbye to reach a node that is there.
        self._socket.setsockopt(zmq.LINGER, _GOODBYE_MS)
        # Not `_advance`, which would greet again.
        self._send()
        self._deliver()
        self._shut()
        # Of whoever waits for a greeting: it finds the client closed.
        self._wake_waiting()

    def forget(self, reply: NodeReply) -> None:
        """Ends the requests of an answer on the node."""
        for request in reply.requests:
            self._answers.pop(request, None)
            self._session.abort(request)
        if self._socket is not None:
            self._advance()

    # The conversation.

    async def _welcome(self, timeout_seconds: float | None) -> wire.Welcome:
        """The node's greeting, waited for. Raises why there is none."""
        self._open()
        if (welcome := self._session.welcome) is not None:
            return welcome
        patience = self._connect_seconds
        if timeout_seconds is not None:
            patience = min(patience, timeout_seconds)
        # A refusal of an earlier greeting may be over; this call waits for the answer to its own.
        self._session.greet_now(time.monotonic())
        self._advance()
        try:
            async with asyncio.timeout(patience):
                while (welcome := self._session.welcome) is None:
                    if self._session.refusal is not None:
                        raise self._session.refusal
                    if self._handshake_refused:
                        self._shut()
                        raise errors.Unauthorized(
                            f"{self._address} refused this client's key or does not prove the expected one; check both"
                            " public keys"
                        )
                    await self._change()
        except TimeoutError as error:
            text = (
                f"no node answered at {self._address} within {patience:g} s; is it running, has it loaded, are the keys"
                " right?"
            )
            kind = errors.TransportError if patience == self._connect_seconds else errors.ClientTimeout
            raise kind(text) from error
        return welcome

    async def _change(self) -> None:
        future = asyncio.get_running_loop().create_future()
        self._changed.append(future)
        await future
        if self._socket is None and not self._handshake_refused:
            raise errors.Cancelled("this client was closed while it waited for the node")

    def _tokenizer_for(self, welcome: wire.Welcome) -> Tokenizer | None:
        # Checked again when another node answers at this address: it may serve another model by now.
        if self._tokenizer_of != welcome.model.tokenizer_digest:
            self._tokenizer = self._make_tokenizer(welcome)
            self._tokenizer_of = welcome.model.tokenizer_digest
        return self._tokenizer

    def _advance(self) -> None:
        """After every event: send what is due, hand out what is new, set the timer."""
        self._send()
        self._deliver()
        self._wake_waiting()
        self._arm()

    def _send(self) -> None:
        socket, frames = self._socket, self._session.outgoing
        if not frames or socket is None:
            return
        # The list is replaced, not cleared: losing the connection below may not append to what is being sent.
        self._session.outgoing = []
        for frame in frames:
            try:
                socket.send(frame, zmq.DONTWAIT)
            except zmq.Again:
                self._lose(f"the node at {self._address} does not read what this client sends")
                self._session.outgoing.clear()
                self._renew()
                return
        # Sending may have taken the descriptor's edge for a frame that arrived meanwhile.
        self._drain_soon()

    def _deliver(self) -> None:
        # Aborting for a stop string may lose the connection, which is news again.
        while deliveries := self._session.take():
            for delivery in deliveries:
                self._hand_out(delivery)
            self._send()

    def _hand_out(self, delivery: Delivery) -> None:
        answer = self._answers.get(delivery.request)
        if answer is None:
            return
        if delivery.failure is not None or delivery.finish_reason is not None:
            del self._answers[delivery.request]
        reply = answer._reply
        kept = reply.accept(delivery)
        if kept is not None:
            self._answers.pop(delivery.request, None)
            self._session.abort(delivery.request, kept)
        if reply.error is not None:
            for request in reply.requests:
                self._answers.pop(request, None)
                self._session.abort(request)
        answer.wake()

    def _wake_waiting(self) -> None:
        session = self._session
        if self._changed and (session.welcome or session.refusal or self._handshake_refused or self._socket is None):
            waiting, self._changed = self._changed, []
            for future in waiting:
                if not future.done():
                    future.set_result(None)

    def _arm(self) -> None:
        due, loop = self._session.next_due(), self._loop
        if due is None or loop is None or self._socket is None:
            return
        delay = max(0.0, due - time.monotonic())
        if self._timer is not None:
            if self._timer.when() <= loop.time() + delay:
                return
            self._timer.cancel()
        self._timer = loop.call_later(delay, self._on_time)

    def _on_time(self) -> None:
        self._timer = None
        # First what has arrived: after a stall of this process, the node's silence may be its own.
        self._listen()
        self._session.tick(time.monotonic())
        self._advance()

    # The socket.

    def _open(self) -> None:
        loop = asyncio.get_running_loop()
        if self._socket is not None:
            if loop is not self._loop:
                raise errors.ConfigError(
                    "this client was used on another event loop; make one AsyncClient per loop, or use Client"
                )
            return
        self._loop = loop
        self._handshake_refused = False
        self._context = zmq.Context()
        try:
            self._socket = self._context.socket(zmq.DEALER)
            for option, value in _SOCKET_OPTIONS:
                self._socket.setsockopt(option, value)
            self._socket.setsockopt(zmq.IPV6, int(self._address.startswith("tcp://[")))
            if self._keys is not None:
                self._socket.setsockopt(zmq.CURVE_SERVERKEY, self._keys.server.encode())
                self._socket.setsockopt(zmq.CURVE_PUBLICKEY, self._keys.public.encode())
                self._socket.setsockopt(zmq.CURVE_SECRETKEY, self._keys.secret.encode())
            self._monitor = self._socket.get_monitor_socket(_WATCHED)
            self._socket.connect(self._address)
        except zmq.ZMQError as error:
            self._shut()
            raise errors.TransportError(f"{self._address} cannot be connected to: {error}") from error
        loop.add_reader(_descriptor(self._socket), self._on_frames)
        loop.add_reader(_descriptor(self._monitor), self._on_connection)
        # Edges may have passed before the loop watched.
        loop.call_soon(self._on_connection)

    def _shut(self) -> None:
        for socket in (self._socket, self._monitor):
            if socket is not None and self._loop is not None and not self._loop.is_closed():
                self._loop.remove_reader(_descriptor(socket))
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._socket is not None:
            self._socket.disable_monitor()
            self._socket.close()
        if self._monitor is not None:
            self._monitor.close()
        if self._context is not None:
            self._context.term()
        self._socket = self._monitor = self._context = None
        self._session.link_down(f"the connection to {self._address} was closed")
        self._session.outgoing.clear()

    def _renew(self) -> None:
        """A connection that stands and takes nothing is of no use: the next call opens another."""
        assert self._loop is not None
        self._loop.call_soon(self._reopen)

    def _reopen(self) -> None:
        if self._socket is not None:
            self._shut()
            self._deliver()
            self._open()

    def _drain_soon(self) -> None:
        if not self._draining and self._loop is not None:
            self._draining = True
            self._loop.call_soon(self._on_frames)

    def _on_frames(self) -> None:
        self._draining = False
        if self._socket is None:
            return
        self._listen()
        self._advance()

    def _listen(self) -> None:
        if self._hear(_MAX_FRAMES_PER_WAKE_UP):
            self._drain_soon()

    def _hear(self, most: int) -> bool:
        """Takes frames that have arrived, `most` at most. Returns whether there may be more."""
        if self._socket is None:
            return False
        now = time.monotonic()
        for _ in range(most):
            try:
                frame = self._socket.recv(zmq.DONTWAIT)
            except zmq.Again:
                return False
            self._session.receive(frame, now)
        return True

    def _lose(self, reason: str) -> None:
        """The connection is gone. What came over it counts: a node that has drained sends the last tokens and leaves,
        and a client that slept for a second meanwhile failed streams of which it had every token."""
        self._hear(_QUEUE_FRAMES)
        self._session.link_down(reason)

    def _on_connection(self) -> None:
        monitor = self._monitor
        while monitor is not None and monitor is self._monitor and monitor.poll(0):
            event: dict[str, Any] = dict(parse_monitor_message(monitor.recv_multipart(zmq.DONTWAIT)))
            kind = event["event"]
            if kind == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                self._session.link_up(time.monotonic())
            elif kind == zmq.EVENT_DISCONNECTED:
                was_welcome = self._session.welcome is not None
                self._lose(f"the connection to {self._address} was lost")
                # What was sent since then would reach the node's successor, long after it made sense. Only greetings
                # go to whom was none, and libzmq waits between its own attempts.
                if was_welcome:
                    self._reopen()
            elif kind == zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL:
                # The peer closed in the handshake. It may have been starting, and libzmq tries again.
                self._session.link_down(f"the connection to {self._address} was lost")
            else:
                self._handshake_refused = True
                self._session.link_down(f"{self._address} refused the handshake")
        self._advance()


def _descriptor(socket: zmq.Socket[bytes]) -> int:
    descriptor = socket.getsockopt(zmq.FD)
    assert isinstance(descriptor, int), "libzmq's descriptor is a number"
    return descriptor
