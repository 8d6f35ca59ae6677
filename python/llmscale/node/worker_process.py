"""Worker processes of a node, named so that no signal reaches another process, and where they come from.

Every worker is a copy of one template, a process that has imported torch: that takes 1.3 s on a quiet machine and was
nearly all of the pause that a killed worker cost its streams, a copy takes some milliseconds. Does not know engines,
epochs of the past or why a worker died.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Sequence

from llmscale.logs import get_logger
from llmscale.node.worker_template import WorkerTemplate
from llmscale.parallel.assignment import Assignment, write_assignment

_log = get_logger("llmscale.node")

WORKER_MODULE = "llmscale.worker"


class WorkerProcess:
    """A child that this process has not started itself. Made where an event loop runs, which hears of its end."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._pidfd = os.pidfd_open(pid)
        self._loop = asyncio.get_running_loop()
        self._ended: asyncio.Future[int] = self._loop.create_future()
        self._loop.add_reader(self._pidfd, self._reap)

    @property
    def is_alive(self) -> bool:
        """Whether its end has not been noticed yet."""
        return not self._ended.done()

    async def wait(self) -> int:
        """The exit code, negative for a signal."""
        return await asyncio.shield(self._ended)

    def send_signal(self, number: signal.Signals) -> None:
        """Does nothing to a process that has ended."""
        if self._pidfd >= 0:
            # It may have ended just now; then there is nobody to tell.
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, number)

    async def stop(self) -> None:
        """Ends it, and waits for the end. It has nothing to put in order, and hears no other signal."""
        self.send_signal(signal.SIGKILL)
        await self.wait()

    def _reap(self) -> None:
        self._loop.remove_reader(self._pidfd)
        _, status = os.waitpid(self.pid, 0)
        os.close(self._pidfd)
        self._pidfd = -1
        self._ended.set_result(os.waitstatus_to_exitcode(status))


class WorkerProcesses:
    """Starts workers. Keeps their template if it may: 25 MB of memory, with torch 0.3 GB, for shorter pauses."""

    def __init__(
        self,
        threads: int | None,
        *,
        keep_spare: bool,
        executor: str = "torch",
        command: Sequence[str] | None = None,
    ) -> None:
        # The child compares: one that starts while this process dies would take its foster parent for its parent.
        usual = (sys.executable, "-m", WORKER_MODULE, "--parent", str(os.getpid()), "--executor", executor)
        words = command or usual
        self._template = WorkerTemplate([*words] if threads is None else [*words, "--threads", str(threads)])
        self._keep_spare = keep_spare
        self._starting = asyncio.Lock()

    @property
    def spare(self) -> int | None:
        """The template's process id, while there is one."""
        return self._template.pid

    async def start(self, assignment: Assignment) -> WorkerProcess:
        """A process that has been told what to be. Raises WorkerError if there can be none."""
        told, tell = os.pipe()
        try:
            async with self._starting:
                pid = await self._template.copy(told)
            # Room for one line is there before anybody reads; a process that is dead by now is noticed by its end.
            with contextlib.suppress(BrokenPipeError):
                os.write(tell, write_assignment(assignment))
        finally:
            os.close(told)
            os.close(tell)
        return WorkerProcess(pid)

    async def prepare(self) -> None:
        """Replaces a template that has died, or ends one that may not be kept. Called when workers serve, so that its
        imports do not compete with theirs."""
        async with self._starting:
            if not self._keep_spare:
                await self._template.close()
                return
            try:
                started = await self._template.open()
            except OSError as error:
                # A full process table ends no replica that serves: the next death only costs an import more.
                _log.warning("there is no spare worker for now", reason=str(error))
                return
            if started:
                _log.info("spare worker started", pid=self._template.pid)

    async def close(self) -> None:
        """Ends the template, and with it a `start` that waits for its imports, which take seconds."""
        self._keep_spare = False
        self._template.kill()
        async with self._starting:
            await self._template.close()
