"""The processes of one host's ranks in one epoch: started together, and ended together when the first of them ends.

One that is left would wait for the others in vain. Owns the memory in which they meet. It does not know why they should
run, or who else runs elsewhere.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Sequence

from llmscale.logs import get_logger
from llmscale.node.rank_meeting import RankMeeting
from llmscale.node.worker_process import WorkerProcess, WorkerProcesses
from llmscale.parallel.assignment import Assignment

_log = get_logger("llmscale.node")


class RankProcesses:
    """See the module."""

    def __init__(self, epoch: int, meeting: RankMeeting) -> None:
        self.epoch = epoch
        self._meeting = meeting
        self._processes: list[tuple[int, WorkerProcess]] = []

    async def start(self, processes: WorkerProcesses, assignments: Sequence[Assignment]) -> None:
        """Starts a process for each."""
        for assignment in assignments:
            rank = assignment.place.rank
            process = await processes.start(assignment)
            self._processes.append((rank, process))
            _log.info("worker started", epoch=self.epoch, pid=process.pid, rank=rank)

    async def first_death(self) -> str:
        """How the first of them ended; the others are ended then."""
        waits = {asyncio.create_task(process.wait()): (rank, process) for rank, process in self._processes}
        try:
            done, _ = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            first = done.pop()
        finally:
            self.kill()
            await asyncio.gather(*waits)
            self._meeting.close()
        rank, process = waits[first]
        code = first.result()
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return f"the worker of rank {rank} (process {process.pid}) died: {how}"

    def kill(self) -> None:
        """Ends all, now."""
        for _, process in self._processes:
            process.send_signal(signal.SIGKILL)

    async def stop(self) -> None:
        """Ends all, and waits for their ends."""
        await asyncio.gather(*(process.stop() for _, process in self._processes))
        self._meeting.close()
