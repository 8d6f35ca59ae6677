"""Keeps the worker processes of a replica alive: starts them, hears of a death, starts all anew under a new epoch.

The ranks of a group live and die together: one that is left waits for the others in vain. Those of other hosts are
started and ended by the nodes there, which a `LeaderGroup` speaks to. A worker that dies before it has ever been ready,
or again and again without a step in between, is not started for ever: after five such deaths within a minute the node
gives up with the worker's last words. It does not know requests; the engine keeps those.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import socket
import time
from dataclasses import dataclass, field

from llmscale._core import Engine, NodeEvent
from llmscale.errors import ConfigError, WorkerError
from llmscale.logs import get_logger
from llmscale.node.disk_folder import DiskFolder
from llmscale.node.group_messages import RankLink
from llmscale.node.host_memory import HostMemory
from llmscale.node.leader_group import LeaderGroup
from llmscale.node.plan import ReplicaPlan
from llmscale.node.rank_meeting import RankMeeting
from llmscale.node.rank_processes import RankProcesses
from llmscale.node.span import Span
from llmscale.node.worker_process import WorkerProcesses
from llmscale.parallel.assignment import Assignment
from llmscale.parallel.hosts import tcp_address

_log = get_logger("llmscale.node")

MAX_FRUITLESS_DEATHS = 5
FRUITLESS_WINDOW_SECONDS = 60.0
FIRST_BACKOFF_SECONDS = 0.05
MAX_BACKOFF_SECONDS = 30.0
LOOPBACK = "127.0.0.1"


@dataclass(slots=True)
class _Life:
    """One epoch of the group."""

    epoch: int
    ranks: RankProcesses
    steps_before: int
    failure: str | None = None

    async def end(self, group: LeaderGroup | None) -> str:
        """Waits until it cannot go on, here or on another host, ends it, and says why."""
        dying = asyncio.create_task(self.ranks.first_death())
        if group is None:
            return await dying
        troubled = asyncio.create_task(group.trouble())
        await asyncio.wait({dying, troubled}, return_when=asyncio.FIRST_COMPLETED)
        reason = None if dying.done() else troubled.result()
        self.ranks.kill()
        troubled.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await troubled
        death = await dying
        return reason or death


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

    def __init__(
        self,
        engine: Engine,
        plan: ReplicaPlan,
        processes: WorkerProcesses,
        span: Span | None = None,
        disk: DiskFolder | None = None,
    ) -> None:
        self._engine = engine
        self._plan = plan
        self._processes = processes
        self._span = span
        self._disk = disk
        self._host_memory = HostMemory(plan.layout.places(0))
        self._preparing: asyncio.Task[None] | None = None
        self._deaths = _Deaths()
        self._life: _Life | None = None
        self._failed: NodeEvent | None = None
        self._stopping = False
        self.ready = asyncio.Event()
        self.drained = asyncio.Event()

    async def run(self) -> None:
        """Supervises until `stop`. Raises WorkerError when workers keep dying, or a host does not come."""
        loop = asyncio.get_running_loop()
        loop.add_reader(self._engine.fileno(), self._hear)
        if self._span is not None:
            self._span.group.open()
        try:
            while await self._gather():
                try:
                    self._life = await self._start()
                except WorkerError:
                    if self._stopping:
                        # `stop` has ended what workers are copied from.
                        return
                    raise
                if self._stopping:
                    # `stop` came while they were started, and has not seen them.
                    self._life.ranks.kill()
                # The engine may have given the worker up while its processes were still being started.
                self._end_failed()
                how = await self._life.end(self._span.group if self._span else None)
                await self._bury(self._life, how)
        finally:
            loop.remove_reader(self._engine.fileno())

    async def stop(self) -> None:
        """Ends the worker processes."""
        self._stopping = True
        if self._span is not None:
            await self._span.group.close()
        await self._processes.close()
        if self._preparing is not None:
            await self._preparing
        if self._life is not None:
            await self._life.ranks.stop()
        self._host_memory.close()

    async def _gather(self) -> bool:
        """Waits for the other hosts; False when there is nothing to start any more."""
        if self._span is not None and not self._stopping:
            await self._span.group.gather(self._span.max_join_seconds)
        return not self._stopping

    async def _start(self) -> _Life:
        plan, span, layout = self._plan, self._span, self._plan.layout
        leader = next(rank for rank in range(layout.ranks) if layout.place(rank).is_leader)
        epoch, links = self._engine.prepare_worker(
            str(plan.folder),
            plan.dtype,
            ranks=layout.ranks,
            leader=leader,
            local_ranks=layout.ranks_per_host,
            reach=None if span is None else tcp_address(span.address, "*"),
        )
        port = None if span is None else _free_port(span.address)
        rendezvous = None if span is None or port is None else tcp_address(span.address, port)
        computes_apart = plan.device != "cpu"
        if rendezvous is None and computes_apart and layout.ranks > 1:
            rendezvous = tcp_address(LOOPBACK, _free_port(LOOPBACK))
        meeting = RankMeeting(
            layout,
            rendezvous=rendezvous,
            computes_apart=computes_apart,
            max_step_seconds=plan.max_step_seconds,
        )
        life = _Life(epoch, RankProcesses(epoch, meeting), self._engine.report().steps)
        if span is not None and port is not None:
            span.group.run(epoch, _links_by_host(plan, links), port)
        places = layout.places(0)
        assignments = [
            Assignment(
                links[place.rank],
                epoch,
                place,
                meeting.of(place),
                host_memory=self._host_memory.path_of(place),
                disk=None if self._disk is None else self._disk.place_of(place.rank, plan.content),
                quantization=plan.quantization,
                kv_dtype=plan.kv_dtype,
                share=(number, len(places)),
                device=plan.device,
                device_index=plan.first_device + number,
                executor=plan.executor,
            )
            for number, place in enumerate(places)
        ]
        try:
            await life.ranks.start(self._processes, assignments)
        except WorkerError:
            # Those that were started before the one that could not be.
            await life.ranks.stop()
            raise
        return life

    async def _bury(self, life: _Life, how: str) -> None:
        if self._span is not None and not self._stopping:
            self._span.group.rest()
        self._engine.worker_died(life.epoch)
        if self._stopping:
            return
        _log.warning("worker died", epoch=life.epoch, how=how, said=life.failure)
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
            if self._span is not None:
                self._span.group.serve()
            if self.ready.is_set():
                self._prepare_spare()
        elif event.kind == "ready":
            self.ready.set()
            self._prepare_spare()
        elif event.kind == "drained":
            _log.info("node has drained", saved_blocks=event.saved_blocks, unsaved_blocks=event.unsaved_blocks)
            self.drained.set()
        elif event.kind == "worker_reset":
            _log.warning("worker gave up its steps and goes on", epoch=event.epoch, said=event.message)
        elif event.kind == "worker_failed":
            self._failed = event
            self._end_failed()

    def _end_failed(self) -> None:
        """A failed worker may hang rather than exit; what it computes is lost either way."""
        life, failed = self._life, self._failed
        if life is not None and failed is not None and life.epoch == failed.epoch:
            life.failure = failed.message
            life.ranks.kill()

    def _prepare_spare(self) -> None:
        if not self._stopping:
            self._preparing = asyncio.create_task(self._processes.prepare())


def _links_by_host(plan: ReplicaPlan, links: list[str]) -> dict[int, tuple[RankLink, ...]]:
    """What the other hosts are told: the port of each of their ranks' links."""
    layout = plan.layout
    return {
        host: tuple(RankLink(place.rank, int(links[place.rank].rpartition(":")[2])) for place in layout.places(host))
        for host in range(1, layout.hosts)
    }


def _free_port(address: str) -> int:
    """A port for one epoch's rendezvous. Who takes it before rank 0 does costs the epoch; the next one has another."""
    try:
        family, _, _, _, where = socket.getaddrinfo(address, 0, type=socket.SOCK_STREAM)[0]
        with socket.create_server(where[:2], family=family) as server:
            port: int = server.getsockname()[1]
            return port
    except OSError as error:
        raise ConfigError(f"no port can be had at {address}, this host's own address: {error}") from error
