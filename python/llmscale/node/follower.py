"""A host that runs ranks of a replica whose engine is on another host: does what the leader wants, until it is ended.

Three things happen beside each other on one event loop: frames are heard, beats are sent, and processes are brought
from what runs to what is wanted. Ranks end at once when the leader goes; then this host waits for the next leader, with
a bound. A host that is asked to end keeps its ranks while the leader drains with them. It owns no engine and knows no
request.
"""

from __future__ import annotations

import asyncio
import contextlib
import time

from llmscale._core import GroupDoor
from llmscale.config import NodeSettings
from llmscale.errors import ConfigError, TransportError, WorkerError
from llmscale.logs import get_logger
from llmscale.node.disk_folder import DiskFolder
from llmscale.node.group_messages import Wanted, decode_leader, encode
from llmscale.node.host_memory import HostMemory
from llmscale.node.membership import Membership
from llmscale.node.plan import ReplicaPlan
from llmscale.node.rank_meeting import RankMeeting
from llmscale.node.rank_processes import RankProcesses
from llmscale.node.roster import BEAT_SECONDS
from llmscale.node.worker_process import WorkerProcesses
from llmscale.parallel.assignment import Assignment
from llmscale.parallel.hosts import Hosts, tcp_address

_log = get_logger("llmscale.node")

LOG_SECONDS = 5.0


class Follower:
    """Runs on one event loop until `stop`."""

    def __init__(
        self,
        hosts: Hosts,
        settings: NodeSettings,
        plan: ReplicaPlan,
        door: GroupDoor,
        membership: Membership,
        processes: WorkerProcesses,
        disk: DiskFolder | None = None,
    ) -> None:
        self._hosts = hosts
        self._settings = settings
        self._plan = plan
        self._door = door
        self._membership = membership
        self._processes = processes
        self._disk = disk
        self._host_memory = HostMemory(plan.layout.places(hosts.index))
        self._stopping = asyncio.Event()
        # Set when what is wanted or what runs may have changed.
        self._changed = asyncio.Event()
        self._had_leader = False
        self._next_log = 0.0

    async def run(self) -> None:
        """Serves until `stop`. Raises ConfigError when the leader refuses this host, WorkerError when none comes."""
        loop = asyncio.get_running_loop()
        loop.add_reader(self._door.fileno(), self._hear)
        beating = asyncio.create_task(self._beat())
        working = asyncio.create_task(self._work())
        stopping = asyncio.create_task(self._stopping.wait())
        try:
            done, _ = await asyncio.wait({beating, working, stopping}, return_when=asyncio.FIRST_COMPLETED)
            for task in done - {stopping}:
                task.result()
        finally:
            loop.remove_reader(self._door.fileno())
            self._door.send(None, encode(self._membership.leave()))
            for task in (beating, working, stopping):
                task.cancel()
                # Their errors have been raised above, or come of the cancellation.
                with contextlib.suppress(asyncio.CancelledError, ConfigError, WorkerError):
                    await task
            await self._processes.close()
            self._host_memory.close()

    async def stop(self, insisted: asyncio.Event) -> None:
        """Ends the ranks and leaves: when the leader needs them no more, or this is `insisted` on."""
        asked_at = time.monotonic()
        while not insisted.is_set() and self._membership.is_needed(time.monotonic() - asked_at):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(insisted.wait(), BEAT_SECONDS / 2)
        self._stopping.set()

    def _hear(self) -> None:
        for _, frame in self._door.take():
            try:
                message = decode_leader(frame)
            except TransportError as error:
                _log.warning("a frame of the leader was dropped", reason=str(error))
                continue
            self._membership.hear(time.monotonic(), message)
        self._changed.set()

    async def _beat(self) -> None:
        """Reports, watches the leader, and gives up when there is none for too long."""
        while True:
            now = time.monotonic()
            self._report(now)
            self._note_leader()
            if self._membership.refusal is not None:
                raise ConfigError(self._membership.refusal)
            if not self._membership.has_leader:
                self._wait_for_leader(now)
            await asyncio.sleep(BEAT_SECONDS / 2)

    def _report(self, now: float) -> None:
        report = self._membership.tick(now)
        if report is not None:
            self._door.send(None, encode(report))

    def _note_leader(self) -> None:
        if self._membership.has_leader == self._had_leader:
            return
        self._had_leader = self._membership.has_leader
        self._changed.set()
        if self._had_leader:
            _log.info("joined the leader", address=self._door.address, host=self._hosts.index)
        else:
            _log.warning("the leader is gone; its ranks end, and this host waits for it", address=self._door.address)

    def _wait_for_leader(self, now: float) -> None:
        waited = self._membership.leaderless_seconds(now)
        if waited > self._settings.max_join_seconds:
            raise WorkerError(
                f"host 0, the leader, did not answer at {self._door.address} ({self._hosts.sources[2]}) within"
                f" {self._settings.max_join_seconds:g} s: {self._absence()}"
            )
        if now >= self._next_log:
            self._next_log = now + LOG_SECONDS
            _log.info("waiting for the leader", address=self._door.address, seconds=round(waited, 1))

    def _absence(self) -> str:
        if self._door.connected:
            return "something listens there and says nothing; is it a node with --host-index 0 and the same --hosts?"
        if self._door.refusals > 0:
            return "what listens there did not accept this node's key; every host needs the same --key-file"
        return "nothing listens there; start host 0, and see that this address and port are reachable from here"

    async def _work(self) -> None:
        """Brings what runs to what is wanted, one epoch after the other."""
        finished: tuple[str, int] | None = None
        while True:
            wanted = self._membership.wanted
            if wanted is None or wanted.group == finished:
                await self._wait_for_change()
                continue
            finished = wanted.group
            await self._run_epoch(wanted)

    async def _wait_for_change(self) -> None:
        self._changed.clear()
        await self._changed.wait()

    async def _run_epoch(self, wanted: Wanted) -> None:
        """Runs the ranks of an epoch until one dies or the leader wants something else."""
        ranks = await self._start(wanted)
        self._membership.started(wanted.epoch)
        self._report(time.monotonic())
        dying = asyncio.create_task(ranks.first_death())
        try:
            await self._watch(wanted, dying)
            death = dying.result() if dying.done() else None
        finally:
            ranks.kill()
            await asyncio.wait({dying})
        self._membership.ended(wanted.epoch, death)
        self._report(time.monotonic())
        _log.warning("workers ended", epoch=wanted.epoch, how=death or "the leader wants them no more")

    async def _watch(self, wanted: Wanted, dying: asyncio.Task[str]) -> None:
        """Returns when a rank has died or this epoch is not wanted any more."""
        has_spares = False
        while not dying.done():
            now = self._membership.wanted
            if now is None or now.group != wanted.group:
                return
            if now.serving and not has_spares:
                has_spares = True
                await self._processes.prepare()
            change = asyncio.create_task(self._wait_for_change())
            await asyncio.wait({dying, change}, return_when=asyncio.FIRST_COMPLETED)
            change.cancel()

    async def _start(self, wanted: Wanted) -> RankProcesses:
        layout, leader = self._plan.layout, self._hosts.leader
        places = layout.places(self._hosts.index)
        ports = {link.rank: link.port for link in wanted.links}
        if set(ports) != {place.rank for place in places}:
            raise WorkerError(f"the leader wants ranks {sorted(ports)} here, host {self._hosts.index} has others")
        plan = self._plan
        rendezvous = tcp_address(leader, wanted.rendezvous_port)
        meeting = RankMeeting(
            layout,
            self._hosts.index,
            rendezvous,
            computes_apart=plan.device != "cpu",
            max_step_seconds=plan.max_step_seconds,
        )
        ranks = RankProcesses(wanted.epoch, meeting)
        key_file = self._settings.key_file
        assignments = [
            Assignment(
                tcp_address(leader, ports[place.rank]),
                wanted.epoch,
                place,
                meeting.of(place),
                model_folder=str(plan.folder),
                quantization=plan.quantization,
                kv_dtype=plan.kv_dtype,
                key_file=None if key_file is None else str(key_file.absolute()),
                host_memory=self._host_memory.path_of(place),
                disk=None if self._disk is None else self._disk.place_of(place.rank, self._plan.content),
                share=(number, len(places)),
                device=plan.device,
                device_index=plan.first_device + number,
                executor=plan.executor,
            )
            for number, place in enumerate(places)
        ]
        await ranks.start(self._processes, assignments)
        return ranks
