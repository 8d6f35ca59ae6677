"""uvicorn's HTTP/1.1 protocol with the bounds that it lacks: header size, header time, connections.

A connection must bring a complete header within a time limit, counted from its opening or from the first byte after a
response, and within a byte limit, whether the bytes come in one packet or one by one; a client that does not read its
answer is dropped. O(1) per header line. A wish for another protocol is ignored: such a request is read to its end and
answered as if it had none. It also lets a response watch and abort its connection. Knows nothing of routes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, ClassVar, Final

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from llmscale.errors import ArrivalTimeout, HeaderTooLarge, LlmscaleError, MalformedRequest, Unavailable
from llmscale.gateway.config import GatewayLimits
from llmscale.gateway.connection import SCOPE_KEY
from llmscale.gateway.http import error_body

# What a client must read per `max_stall_seconds` of an answer that waits for it: with 30 s, 1 KiB a second.
_MIN_READ_BYTES: Final = 32 << 10
_FINAL_HEADS: Final = tuple(f"HTTP/1.1 {digit}".encode() for digit in "2345")
# The fields that say where a request ends.
_FRAMING: Final = frozenset({b"content-length", b"transfer-encoding"})


class _CoalescingTransport:
    """Holds a response's head back until its first bytes of body, so that both leave in one system call and packet."""

    __slots__ = (
        "_head",
        "_linger",
        "_transport",
        "abort",
        "get_extra_info",
        "get_write_buffer_size",
        "is_closing",
        "pause_reading",
        "resume_reading",
    )

    def __init__(self, transport: asyncio.Transport, linger: Callable[[], None]) -> None:
        self._transport = transport
        self._linger = linger
        self.get_write_buffer_size = transport.get_write_buffer_size
        self._head = b""
        self.abort = transport.abort
        self.get_extra_info = transport.get_extra_info
        self.is_closing = transport.is_closing
        self.pause_reading = transport.pause_reading
        self.resume_reading = transport.resume_reading

    def write(self, data: bytes) -> None:
        """Holds the head of a final response; sends anything else, after what was held."""
        if not self._head and data.startswith(_FINAL_HEADS):
            self._head = data
            return
        if self._head:
            data, self._head = self._head + data, b""
        self._transport.write(data)

    def close(self) -> None:
        """Sends what was held and closes after it has left."""
        self.flush()
        self._transport.close()
        if self._transport.get_write_buffer_size():
            self._linger()

    def flush(self) -> None:
        """Sends what was held."""
        if self._head:
            head, self._head = self._head, b""
            self._transport.write(head)


class GuardedProtocol(HttpToolsProtocol):
    """One client connection. `limits` is set on a subclass per server, because uvicorn makes the instances."""

    limits: ClassVar[GatewayLimits] = GatewayLimits()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._header_timer: asyncio.TimerHandle | None = None
        self._header_bytes = 0
        self._header_fields = 0
        self._in_header = True
        self._is_repeated = False
        self._is_lost = False
        self._unread_timer: asyncio.TimerHandle | None = None
        self._unread_bytes = 0
        self._lost: Callable[[], None] | None = None

    # What a response may do with its connection.

    def on_lost(self, callback: Callable[[], None] | None) -> None:
        """Sets who is told that the client has gone away; None stops it."""
        if self._is_lost and callback is not None:
            # The client left between its request's last byte and the start of the response's task.
            self.loop.call_soon(callback)
        else:
            self._lost = callback

    def abort(self) -> None:
        """Drops the connection without flushing what the client does not read."""
        self.transport.abort()

    @property
    def body_complete(self) -> bool:
        """Whether the whole body of the current request has arrived."""
        return not self.cycle.more_body

    # What the event loop calls.

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(_CoalescingTransport(transport, self._watch_unread))  # type: ignore[arg-type]
        if len(self.connections) > self.limits.max_connections:
            self._refuse(
                Unavailable(f"this gateway has {self.limits.max_connections} open connections; retry in a moment")
            )
        else:
            self._header_timer = self.loop.call_later(self.limits.max_header_seconds, self._header_late)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_header_timer()
        self._stop_watching_unread()
        self._is_lost = True
        lost, self._lost = self._lost, None
        super().connection_lost(exc)
        if lost is not None:
            lost()

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        if self._in_header:
            self._header_bytes += len(data)
        self._feed(data)
        if not (self._in_header or self.cycle is None or self.cycle.response_complete) or self.transport.is_closing():
            return
        if self._in_header and self._header_bytes > self.limits.max_header_bytes:
            self._refuse(self._too_large())
        elif self._header_timer is None:
            # uvicorn stopped its idle timer at this byte. Without a timer of ours a header could stay incomplete
            # forever.
            self._header_timer = self.loop.call_later(self.limits.max_header_seconds, self._header_late)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_unread()

    def resume_writing(self) -> None:
        super().resume_writing()
        if not self.transport.is_closing():
            self._stop_watching_unread()

    def timeout_keep_alive_handler(self) -> None:
        """An idle connection whose last response was not read to its end is dropped, any other one closed."""
        if self.transport.get_write_buffer_size():
            self.abort()
        else:
            super().timeout_keep_alive_handler()

    # What the parser calls. A header that is repeated for a new parser has been counted and taken already.

    def on_message_begin(self) -> None:
        if self._is_repeated:
            return
        self._in_header = True
        self._header_fields = self._header_bytes = 0
        super().on_message_begin()
        self.scope[SCOPE_KEY] = self  # type: ignore[typeddict-unknown-key]

    def on_url(self, url: bytes) -> None:
        if self._is_repeated:
            return
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._is_repeated:
            return
        self._header_fields += 1
        self._count(len(name) + len(value) + 4)
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if self._is_repeated:
            return
        self._in_header = False
        self._header_bytes = 0
        self._stop_header_timer()
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        # The parser ends a request that asks for another protocol at its header. Its body is still to come.
        if not self.parser.should_upgrade():
            super().on_message_complete()

    def on_response_complete(self) -> None:
        # A response without a body, as to HEAD, has no later write that its head could wait for.
        self.transport.flush()  # type: ignore[attr-defined]
        super().on_response_complete()

    def send_400_response(self, msg: str) -> None:
        """uvicorn calls this for every parser error, also for those that our callbacks raise."""
        if self._header_bytes > self.limits.max_header_bytes or self._header_fields > self.limits.max_headers:
            self._refuse(self._too_large())
        else:
            self._refuse(MalformedRequest("the bytes are not a valid HTTP/1.1 request"))

    def _feed(self, data: bytes) -> None:
        """As uvicorn's `data_received`, but what follows the header of a request for another protocol is its body."""
        self._unset_keepalive_if_required()
        # A view: a packet may hold thousands of such requests, and each would copy the bytes after it.
        left = memoryview(data)
        try:
            while True:
                try:
                    self.parser.feed_data(left)
                except httptools.HttpParserUpgrade as upgrade:
                    left = left[upgrade.args[0] :]
                    self._stay()
                else:
                    return
        except httptools.HttpParserError:
            self.send_400_response("")

    def _stay(self) -> None:
        """Reads on in HTTP/1.1 after the header of a request that asks for another protocol.

        A parser cannot be told to, so a new one gets a header that is followed by the same body: of the request's own
        header, only what says where it ends and whether another may come after it.
        """
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
        head = [b"POST / HTTP/1.1\r\n" if self.cycle.keep_alive else b"POST / HTTP/1.1\r\nConnection: close\r\n"]
        head += [b"%b: %b\r\n" % (name, value) for name, value in self.headers if name in _FRAMING]
        head.append(b"\r\n")
        self._is_repeated = True
        try:
            self.parser.feed_data(b"".join(head))
        finally:
            self._is_repeated = False

    def _count(self, size: int) -> None:
        self._header_bytes += size
        if self._header_bytes > self.limits.max_header_bytes or self._header_fields > self.limits.max_headers:
            raise self._too_large()

    def _too_large(self) -> HeaderTooLarge:
        return HeaderTooLarge(
            f"the header exceeds {self.limits.max_header_bytes} bytes or {self.limits.max_headers} fields; send less"
        )

    def _header_late(self) -> None:
        self._header_timer = None
        if not self.transport.is_closing():
            self._refuse(ArrivalTimeout(f"the header was not complete within {self.limits.max_header_seconds:g} s"))

    def _watch_unread(self) -> None:
        """Begins to look at whether the client reads what is buffered for it."""
        if self._unread_timer is None:
            self._unread_bytes = self.transport.get_write_buffer_size()
            self._unread_timer = self.loop.call_later(self.limits.max_stall_seconds, self._look_at_unread)

    def _look_at_unread(self) -> None:
        self._unread_timer = None
        left = self.transport.get_write_buffer_size()
        if left > self._unread_bytes - _MIN_READ_BYTES:
            self.abort()
        else:
            self._watch_unread()

    def _stop_watching_unread(self) -> None:
        if self._unread_timer is not None:
            self._unread_timer.cancel()
            self._unread_timer = None

    def _stop_header_timer(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    def _refuse(self, error: LlmscaleError) -> None:
        """Answers without the application and closes."""
        self._stop_header_timer()
        body = error_body(error)
        self.transport.write(
            STATUS_LINE[error.http_status]
            + b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % len(body)
            + body
        )
        self.transport.close()
