"""Opens a TCP stream between every two of some ranks, for what they exchange when they are on several hosts.

Each rank listens on the interface that ranks of other hosts reach it by, and says where, with a secret, in the store at
which the replica's ranks have met; of every two the one of the higher number connects. Whoever does not know the secret
is hung up on. O(ranks), once per epoch, and every wait has an end. It does not know what streams carry.
"""

from __future__ import annotations

import hmac
import secrets
import socket
import time
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Protocol

from llmscale.errors import WorkerError
from llmscale.parallel.interface import address_of

_SECRET_BYTES = 16
_RANK_BYTES = 4
MAX_HELLO_SECONDS = 5.0
"""How long a caller may take to say who it is."""


class Store(Protocol):
    """Where ranks have met: a store of torch.distributed."""

    def set(self, key: str, value: str, /) -> None:
        """Tells the others."""

    def get(self, key: str, /) -> bytes:
        """What one of them has told, waited for. Raises RuntimeError in the end."""


@dataclass(frozen=True, slots=True)
class Circle:
    """Some ranks that are to have streams to each other, and which of them this one is."""

    name: str
    """Equal for all of them, and no other circle's."""
    index: int
    size: int


def open_streams(circle: Circle, store: Store, interface: str, max_wait_seconds: float) -> list[int | None]:
    """Descriptors of connected sockets, by index in the circle, None for the own one; the caller owns them. Listens on
    `interface`. Raises WorkerError with who is missing, and ConfigError where the interface has no address."""
    deadline = time.monotonic() + max_wait_seconds
    host = address_of(interface)
    with ExitStack() as opened:
        listener = opened.enter_context(socket.create_server((host, 0), backlog=circle.size))
        secret = secrets.token_bytes(_SECRET_BYTES)
        where = f"{host} {listener.getsockname()[1]} {secret.hex()}"
        streams: list[socket.socket | None] = [None] * circle.size
        try:
            store.set(_key(circle, circle.index), where)
            for other in range(circle.index):
                streams[other] = opened.enter_context(_connect(circle, store.get(_key(circle, other)), deadline))
            while None in streams[circle.index + 1 :]:
                caller, rank = _accept(listener, secret, deadline)
                opened.enter_context(caller)
                if rank is not None and circle.index < rank < circle.size and streams[rank] is None:
                    streams[rank] = caller
        except (OSError, RuntimeError, ValueError) as error:
            missing = [rank for rank, stream in enumerate(streams) if stream is None and rank != circle.index]
            raise WorkerError(
                f"rank {circle.index} of {circle.name} has no stream to ranks {missing} there: {error}"
            ) from error
        return [None if stream is None else stream.detach() for stream in streams]


def _key(circle: Circle, index: int) -> str:
    return f"llmscale/streams/{circle.name}/{index}"


def _connect(circle: Circle, where: bytes, deadline: float) -> socket.socket:
    host, port, secret = where.decode().split(" ")
    stream = socket.create_connection((host, int(port)), timeout=_left(deadline))
    stream.sendall(bytes.fromhex(secret) + circle.index.to_bytes(_RANK_BYTES, "little"))
    return stream


def _accept(listener: socket.socket, secret: bytes, deadline: float) -> tuple[socket.socket, int | None]:
    """The next caller, and which rank it proves to be."""
    listener.settimeout(_left(deadline))
    caller, _ = listener.accept()
    caller.settimeout(min(MAX_HELLO_SECONDS, _left(deadline)))
    hello = b""
    try:
        while len(hello) < _SECRET_BYTES + _RANK_BYTES:
            piece = caller.recv(_SECRET_BYTES + _RANK_BYTES - len(hello))
            if not piece:
                break
            hello += piece
    except OSError:
        # A stranger's silence or reset is not an error of this rank.
        hello = b""
    if len(hello) != _SECRET_BYTES + _RANK_BYTES or not hmac.compare_digest(hello[:_SECRET_BYTES], secret):
        caller.close()
        return caller, None
    return caller, int.from_bytes(hello[_SECRET_BYTES:], "little")


def _left(deadline: float) -> float:
    """Seconds, never none: a socket without a time-out would wait for ever."""
    return max(0.001, deadline - time.monotonic())
