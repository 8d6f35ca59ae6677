"""Worker processes of a node: those at work, and as many spares that have imported torch already.

Importing torch takes 1.3 s on a quiet machine, which was nearly all of the pause that a killed worker cost its streams.
A spare waits with its imports done until it gets its assignment through its standard input. It does not know engines,
epochs of the past or why a worker died.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Sequence

import structlog

from llmscale.parallel.assignment import Assignment, write_assignment

_log = structlog.get_logger("llmscale.node")

STOP_SECONDS = 2.0
WORKER_MODULE = "llmscale.worker"


class WorkerProcess:
    """One child process, named by a file descriptor so that a signal can never reach another process."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        # asyncio's own terminate() polls first, and what that reaps is lost to whoever waits.
        self._pidfd = os.pidfd_open(process.pid)
        self.pid = process.pid

    @property
    def is_alive(self) -> bool:
        """Whether its end has not been noticed yet."""
        return self._process.returncode is None

    async def assign(self, assignment: Assignment) -> bool:
        """Tells a waiting process what to be. Returns False if it is dead."""
        pipe = self._process.stdin
        assert pipe is not None, "the process was started with a pipe"
        try:
            pipe.write(write_assignment(assignment))
            await pipe.drain()
            pipe.close()
            await pipe.wait_closed()
        except (BrokenPipeError, ConnectionResetError):
            return False
        return True

    async def wait(self) -> int:
        """The exit code, negative for a signal."""
        code = await self._process.wait()
        self._close()
        return code

    def send_signal(self, number: signal.Signals) -> None:
        """Does nothing to a process that has ended."""
        if self._pidfd >= 0:
            # It may have ended just now; then there is nobody to tell.
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, number)

    async def stop(self) -> None:
        """Asks it to end, insists after two seconds, and waits for the end."""
        self.send_signal(signal.SIGTERM)
        try:
            await asyncio.wait_for(self.wait(), STOP_SECONDS)
        except TimeoutError:
            self.send_signal(signal.SIGKILL)
            await self.wait()

    def _close(self) -> None:
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1


class WorkerProcesses:
    """Starts workers, and keeps spares if it may: about 0.3 GB of memory each for a pause that is a second shorter."""

    def __init__(
        self,
        threads: int | None,
        *,
        keep_spares: int,
        command: Sequence[str] | None = None,
    ) -> None:
        # The child compares: one that starts while this process dies would take its foster parent for its parent.
        words = command or (sys.executable, "-m", WORKER_MODULE, "--parent", str(os.getpid()))
        self._command = [*words] if threads is None else [*words, "--threads", str(threads)]
        self._keep_spares = keep_spares
        self._spares: list[WorkerProcess] = []
        self._preparing = asyncio.Lock()

    @property
    def spares(self) -> tuple[WorkerProcess, ...]:
        """The processes that wait."""
        return tuple(self._spares)

    async def start(self, assignment: Assignment) -> WorkerProcess:
        """A process that has been told what to be; a spare if there is one."""
        async with self._preparing:
            while self._spares:
                spare = self._spares.pop()
                if spare.is_alive and await spare.assign(assignment):
                    return spare
                _log.warning("a spare worker had died", pid=spare.pid)
                await spare.wait()
        process = await self._spawn()
        # A process that dies this early is noticed by whoever waits for its end.
        await process.assign(assignment)
        return process

    async def prepare(self) -> None:
        """Starts the spares that are missing. Called when workers serve, so that their imports do not compete."""
        async with self._preparing:
            for spare in [spare for spare in self._spares if not spare.is_alive]:
                self._spares.remove(spare)
                await spare.wait()
            while len(self._spares) < self._keep_spares:
                self._spares.append(await self._spawn())
                _log.info("spare worker started", pid=self._spares[-1].pid)

    async def close(self) -> None:
        """Ends the spares."""
        async with self._preparing:
            self._keep_spares = 0
            spares, self._spares = self._spares, []
        await asyncio.gather(*(spare.stop() for spare in spares))

    async def _spawn(self) -> WorkerProcess:
        return WorkerProcess(await asyncio.create_subprocess_exec(*self._command, stdin=asyncio.subprocess.PIPE))
