"""Keeps the worker processes of a replica alive: starts them, hears of a death, starts all anew under a new epoch.

The ranks of a group live and die together: one that is left waits for the others in vain. A worker that dies before it
has ever been ready, or again and again without a step in between, is not started for ever: after five such deaths
within a minute the node gives up with the worker's last words. It does not know requests; the engine keeps those.
"""

from __future__ import annotations

import asyncio
import collections
import signal
import time
from dataclasses import dataclass, field

import structlog

from llmscale._core import Engine, NodeEvent
from llmscale.errors import WorkerError
from llmscale.models.shard import RankPlace
from llmscale.node.plan import ReplicaPlan
from llmscale.node.rank_meeting import RankMeeting
from llmscale.node.worker_process import WorkerProcess, WorkerProcesses
from llmscale.parallel.assignment import Assignment

_log = structlog.get_logger("llmscale.node")

MAX_FRUITLESS_DEATHS = 5
FRUITLESS_WINDOW_SECONDS = 60.0
FIRST_BACKOFF_SECONDS = 0.05
MAX_BACKOFF_SECONDS = 30.0


@dataclass(slots=True)
class _Life:
    """The processes of one epoch, by rank."""

    epoch: int
    processes: list[WorkerProcess]
    meeting: RankMeeting
    steps_before: int
    failure: str | None = None

    async def first_death(self) -> tuple[WorkerProcess, int]:
        """The process that ends first, with its exit code; the others are ended then."""
        waits = {asyncio.create_task(process.wait()): process for process in self.processes}
        done, _ = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        first = done.pop()
        self.kill()
        await asyncio.gather(*waits)
        self.meeting.close()
        return waits[first], first.result()

    def kill(self) -> None:
        """Ends all, now."""
        for process in self.processes:
            process.send_signal(signal.SIGKILL)


@dataclass(slots=True)
class _Deaths:
    """Recent deaths that followed no completed step."""

    times: collections.deque[float] = field(default_factory=collections.deque)

    def note(self, now: float) -> int:
        """Counts one more and returns how many lie within the window."""
        self.times.append(now)
        while self.times and now - self.times[0] > FRUITLESS_WINDOW_SECONDS:
            self.times.popleft()
        return len(self.times)


class WorkerSupervisor:
    """Decides when a node's worker processes start and end."""

    def __init__(self, engine: Engine, plan: ReplicaPlan, processes: WorkerProcesses) -> None:
        self._engine = engine
        self._plan = plan
        self._processes = processes
        self._preparing: asyncio.Task[None] | None = None
        self._deaths = _Deaths()
        self._life: _Life | None = None
        self._stopping = False
        self.ready = asyncio.Event()
        self.drained = asyncio.Event()

    async def run(self) -> None:
        """Supervises until `stop`. Raises WorkerError when workers keep dying."""
        loop = asyncio.get_running_loop()
        loop.add_reader(self._engine.fileno(), self._hear)
        try:
            while not self._stopping:
                self._life = await self._start()
                process, code = await self._life.first_death()
                await self._bury(self._life, process, code)
        finally:
            loop.remove_reader(self._engine.fileno())

    async def stop(self) -> None:
        """Ends the worker processes: asks first, insists after two seconds."""
        self._stopping = True
        if self._preparing is not None:
            await self._preparing
        await self._processes.close()
        if self._life is not None:
            await asyncio.gather(*(process.stop() for process in self._life.processes))

    async def _start(self) -> _Life:
        plan = self._plan
        places = [RankPlace.of_rank(rank, plan.tensor_size, plan.stages) for rank in range(plan.ranks)]
        leader = next(place.rank for place in places if place.is_leader)
        epoch, links = self._engine.prepare_worker(str(plan.folder), plan.dtype, ranks=plan.ranks, leader=leader)
        life = _Life(epoch, [], RankMeeting(plan.tensor_size, plan.stages), self._engine.report().steps)
        for place, link in zip(places, links, strict=True):
            process = await self._processes.start(Assignment(link, epoch, place, life.meeting.of(place)))
            life.processes.append(process)
            _log.info("worker started", epoch=epoch, pid=process.pid, rank=place.rank)
        return life

    async def _bury(self, life: _Life, process: WorkerProcess, code: int) -> None:
        self._engine.worker_died(life.epoch)
        if self._stopping:
            return
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        _log.warning("worker died", epoch=life.epoch, pid=process.pid, how=how, said=life.failure)
        if self._engine.report().steps > life.steps_before:
            return
        deaths = self._deaths.note(time.monotonic())
        if deaths >= MAX_FRUITLESS_DEATHS:
            said = life.failure or how
            raise WorkerError(
                f"{deaths} workers died within {FRUITLESS_WINDOW_SECONDS:.0f} s without completing a step; the last one"
                f" said: {said}"
            )
        await asyncio.sleep(min(FIRST_BACKOFF_SECONDS * 4 ** (deaths - 1), MAX_BACKOFF_SECONDS))

    def _hear(self) -> None:
        for event in self._engine.take_events():
            self._note(event)

    def _note(self, event: NodeEvent) -> None:
        if event.kind == "worker_ready":
            _log.info("worker ready", epoch=event.epoch, pid=event.pid, loading_ms=event.loading_ns // 1_000_000)
            if self.ready.is_set():
                self._prepare_spare()
        elif event.kind == "ready":
            self.ready.set()
            self._prepare_spare()
        elif event.kind == "drained":
            self.drained.set()
        elif event.kind == "worker_reset":
            _log.warning("worker gave up its steps and goes on", epoch=event.epoch, said=event.message)
        elif event.kind == "worker_failed" and self._life is not None and self._life.epoch == event.epoch:
            self._life.failure = event.message
            # It may hang rather than exit; what it computes is lost either way.
            self._life.kill()

    def _prepare_spare(self) -> None:
        if not self._stopping:
            self._preparing = asyncio.create_task(self._processes.prepare())
