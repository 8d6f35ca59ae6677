"""The node's side of the template of its workers: one child process with torch imported, asked for copies of itself.

An order is a pipe, handed over by a socket; the answer is the copy's process id. The copy is a child of this process,
which adopts orphans for that. One order at a time. Does not know what a copy is told.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Sequence

from llmscale._core import adopt_orphans
from llmscale.errors import WorkerError
from llmscale.logs import get_logger

_log = get_logger("llmscale.node")

PID_BYTES = 4


class WorkerTemplate:
    """Started when it is first needed, and again when it has died. `command` gets the socket's number as --orders."""

    def __init__(self, command: Sequence[str]) -> None:
        self._command = command
        self._process: asyncio.subprocess.Process | None = None
        self._orders: socket.socket | None = None
        self._is_over = False

    @property
    def pid(self) -> int | None:
        """Its process id, while there is one."""
        return None if self._process is None else self._process.pid

    async def open(self) -> bool:
        """Starts it if it does not run. Returns whether it had to be started. Raises WorkerError after `kill`."""
        if self._is_over:
            raise WorkerError("no worker is copied any more: the node ends")
        if self._process is not None and self._process.returncode is None:
            return False
        await self.close()
        adopt_orphans()
        self._orders, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._orders.settimeout(0)
        with theirs:
            words = [*self._command, "--orders", str(theirs.fileno())]
            self._process = await asyncio.create_subprocess_exec(
                *words, stdin=asyncio.subprocess.DEVNULL, pass_fds=[theirs.fileno()]
            )
        if self._is_over:
            # `kill` came while it was started, and has not seen it.
            self.kill()
        return True

    async def copy(self, pipe: int) -> int:
        """The process id of a new copy, which has the pipe. Raises WorkerError if the template cannot be started."""
        if not await self.open():
            pid = await self._ask(pipe)
            if pid is not None:
                return pid
            _log.warning("the spare worker had died", pid=self.pid)
            await self.close()
            await self.open()
        pid = await self._ask(pipe)
        if pid is None:
            assert self._process is not None, "it was just opened"
            code = await self._process.wait()
            raise WorkerError(
                f"the process that workers are copied from ended with code {code}; its last words are above"
            )
        return pid

    async def _ask(self, pipe: int) -> int | None:
        """None if it is dead."""
        assert self._orders is not None, "it was opened"
        try:
            socket.send_fds(self._orders, [b"+"], [pipe])
            answer = await asyncio.get_running_loop().sock_recv(self._orders, PID_BYTES)
        except (BrokenPipeError, ConnectionResetError):
            return None
        return int.from_bytes(answer, "little") if answer else None

    def kill(self) -> None:
        """Ends it for good, also while it imports: whoever waits for a copy hears of it. `close` waits for its end."""
        self._is_over = True
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()

    async def close(self) -> None:
        """Ends it, if it runs. It has nothing to put in order; ending in peace with torch loaded takes it 0.7 s."""
        if self._orders is not None:
            self._orders.close()
            self._orders = None
        if self._process is not None:
            # It may have ended by itself.
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            await self._process.wait()
            self._process = None
