"""Worker processes of a node: one at work, and one spare that has imported torch already.

Importing torch takes 1.3 s on a quiet machine, which was nearly all of the pause that a killed worker cost its streams.
A spare waits with its imports done until it gets its assignment through its standard input. It does not know engines,
epochs of the past or why a worker died.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import Sequence

import structlog

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

    async def assign(self, link: str, epoch: int) -> bool:
        """Tells a waiting process what to serve. Returns False if it is dead."""
        pipe = self._process.stdin
        assert pipe is not None, "the process was started with a pipe"
        try:
            pipe.write(json.dumps({"link": link, "epoch": epoch}).encode() + b"\n")
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
    """Starts workers, and keeps a spare if it may: about 0.2 GB of memory for a pause that is a second shorter."""

    def __init__(self, threads: int | None, *, keep_spare: bool, command: Sequence[str] | None = None) -> None:
        # The child compares: one that starts while this process dies would take its foster parent for its parent.
        words = command or (sys.executable, "-m", WORKER_MODULE, "--parent", str(os.getpid()))
        self._command = [*words] if threads is None else [*words, "--threads", str(threads)]
        self._keep_spare = keep_spare
        self._spare: WorkerProcess | None = None
        self._preparing = asyncio.Lock()

    @property
    def spare(self) -> WorkerProcess | None:
        """The process that waits."""
        return self._spare

    async def start(self, link: str, epoch: int) -> WorkerProcess:
        """A process that has been told to serve this link; the spare if there is one."""
        async with self._preparing:
            spare, self._spare = self._spare, None
        if spare is not None:
            if spare.is_alive and await spare.assign(link, epoch):
                return spare
            _log.warning("the spare worker had died", pid=spare.pid)
            await spare.wait()
        process = await self._spawn()
        # A process that dies this early is noticed by whoever waits for its end.
        await process.assign(link, epoch)
        return process

    async def prepare(self) -> None:
        """Starts a spare if none is alive. Called when the worker serves, so that their imports do not compete."""
        async with self._preparing:
            if not self._keep_spare or (self._spare is not None and self._spare.is_alive):
                return
            if self._spare is not None:
                await self._spare.wait()
            self._spare = await self._spawn()
            _log.info("spare worker started", pid=self._spare.pid)

    async def close(self) -> None:
        """Ends the spare."""
        async with self._preparing:
            self._keep_spare = False
            spare, self._spare = self._spare, None
        if spare is not None:
            await spare.stop()

    async def _spawn(self) -> WorkerProcess:
        return WorkerProcess(await asyncio.create_subprocess_exec(*self._command, stdin=asyncio.subprocess.PIPE))
