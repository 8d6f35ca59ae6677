"""Keeps one worker process alive: starts it, hears of its death at once, starts the next one under a new epoch.

A worker that dies before it has ever been ready, or again and again without a step in between, is not started for ever:
after five such deaths within a minute the node gives up with the worker's last words. It does not know requests; the
engine keeps those.
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
from llmscale.node.plan import ReplicaPlan
from llmscale.node.worker_process import WorkerProcess, WorkerProcesses

_log = structlog.get_logger("llmscale.node")

MAX_FRUITLESS_DEATHS = 5
FRUITLESS_WINDOW_SECONDS = 60.0
FIRST_BACKOFF_SECONDS = 0.05
MAX_BACKOFF_SECONDS = 30.0


@dataclass(slots=True)
class _Life:
    """One worker process."""

    epoch: int
    process: WorkerProcess
    steps_before: int
    failure: str | None = None


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
    """Decides when a node's worker process starts and ends."""

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
                code = await self._life.process.wait()
                await self._bury(self._life, code)
        finally:
            loop.remove_reader(self._engine.fileno())

    async def stop(self) -> None:
        """Ends the worker process: asks first, insists after two seconds."""
        self._stopping = True
        if self._preparing is not None:
            await self._preparing
        await self._processes.close()
        if self._life is not None:
            await self._life.process.stop()

    async def _start(self) -> _Life:
        epoch, address = self._engine.prepare_worker(str(self._plan.folder), self._plan.dtype)
        process = await self._processes.start(address, epoch)
        _log.info("worker started", epoch=epoch, pid=process.pid)
        return _Life(epoch, process, self._engine.report().steps)

    async def _bury(self, life: _Life, code: int) -> None:
        self._engine.worker_died(life.epoch)
        if self._stopping:
            return
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        _log.warning("worker died", epoch=life.epoch, pid=life.process.pid, how=how, said=life.failure)
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
            self._life.process.send_signal(signal.SIGKILL)

    def _prepare_spare(self) -> None:
        if not self._stopping:
            self._preparing = asyncio.create_task(self._processes.prepare())
