"""What a response may do with the connection that carries it: notice that it is gone, and abort it.

Under llmscale's own server both are direct calls, without a task per request; under any other ASGI server a task waits
for the disconnect message. O(1) each. Knows nothing of HTTP messages.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final, Protocol

from llmscale.gateway.asgi import Receive, Scope

SCOPE_KEY: Final = "llmscale.connection"


class Connection(Protocol):
    """What the server's protocol offers."""

    def on_lost(self, callback: Callable[[], None] | None) -> None:
        """Sets who is told that the client has gone away; None stops it."""

    def abort(self) -> None:
        """Drops the connection without flushing what the client does not read."""

    @property
    def body_complete(self) -> bool:
        """Whether the whole body has arrived."""


def body_complete(scope: Scope) -> bool:
    """Whether the request's whole body has arrived; False where the server does not tell."""
    connection: Connection | None = scope.get(SCOPE_KEY)
    return connection is not None and connection.body_complete


def watch(scope: Scope, receive: Receive, gone: Callable[[], None]) -> Callable[[], None]:
    """Calls `gone` when the client disconnects. Returns what stops the watch."""
    connection: Connection | None = scope.get(SCOPE_KEY)
    if connection is not None:
        connection.on_lost(gone)
        return lambda: connection.on_lost(None)
    task = asyncio.ensure_future(_wait_for_disconnect(receive, gone))
    return lambda: _stop(task)


def abort(scope: Scope) -> None:
    """Drops the connection, where the server lets us."""
    connection: Connection | None = scope.get(SCOPE_KEY)
    if connection is not None:
        connection.abort()


def _stop(task: asyncio.Task[None]) -> None:
    task.cancel()


async def _wait_for_disconnect(receive: Receive, gone: Callable[[], None]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    gone()
