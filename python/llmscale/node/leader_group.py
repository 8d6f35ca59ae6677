"""The leader's door to the hosts of its replica: sends and hears for a roster, and wakes whoever waits for a change.

One reader on the door's descriptor and one timer; what a frame means is the roster's. Gathering waits for hosts that
are missing, with a bound after which they are named. It does not know processes or the engine.
"""

from __future__ import annotations

import asyncio
import time

from llmscale._core import GroupDoor
from llmscale.errors import TransportError, WorkerError
from llmscale.logs import get_logger
from llmscale.node.group_messages import HostFacts, RankLink, Refused, decode_follower, encode
from llmscale.node.roster import BEAT_SECONDS, Outgoing, Roster

_log = get_logger("llmscale.node")

LOG_SECONDS = 5.0


class LeaderGroup:
    """Runs between `open` and `close`, on one event loop."""

    def __init__(self, door: GroupDoor, incarnation: str, facts: HostFacts, kv_blocks: int) -> None:
        self._door = door
        self._hosts = facts.hosts
        self._roster = Roster(incarnation, facts, kv_blocks)
        self._changed = asyncio.Event()
        self._closed = False
        self._ticking: asyncio.Task[None] | None = None

    def open(self) -> None:
        """Begins to hear and to beat."""
        asyncio.get_running_loop().add_reader(self._door.fileno(), self._hear)
        self._ticking = asyncio.create_task(self._tick())

    async def gather(self, max_wait_seconds: float) -> bool:
        """Waits until all hosts are there and run nothing. False: closed meanwhile. Raises WorkerError with names."""
        deadline = time.monotonic() + max_wait_seconds
        next_log = 0.0
        while (self._roster.missing or self._roster.busy) and not self._closed:
            now = time.monotonic()
            if now > deadline:
                raise WorkerError(self._absence(max_wait_seconds))
            if self._roster.missing and now >= next_log:
                next_log = now + LOG_SECONDS
                _log.info("waiting for hosts", missing=_names(self._roster.missing), address=self._door.address)
            # Every change ends the wait; the second is for the log and the deadline.
            await self._wait(1.0)
        return not self._closed

    def run(self, epoch: int, links: dict[int, tuple[RankLink, ...]], rendezvous_port: int) -> None:
        """Has the other hosts start their ranks of an epoch."""
        self._send(self._roster.run(epoch, links, rendezvous_port))

    def serve(self) -> None:
        """Tells them that the group has loaded."""
        self._send(self._roster.serve())

    def drain(self) -> None:
        """Tells them that this host ends, and needs their ranks until it does."""
        self._send(self._roster.drain())

    def rest(self) -> None:
        """Has them end their ranks."""
        self._send(self._roster.rest())

    async def trouble(self) -> str:
        """Returns when the ranks of the current epoch cannot go on, with the reason."""
        while self._roster.trouble is None:
            await self._wait(None)
        return self._roster.trouble

    async def close(self) -> None:
        """Says goodbye and ends."""
        if self._closed:
            return
        self._closed = True
        self._changed.set()
        self._send(self._roster.end())
        if self._ticking is not None:
            self._ticking.cancel()
            asyncio.get_running_loop().remove_reader(self._door.fileno())

    def _absence(self, waited_seconds: float) -> str:
        if not self._roster.missing:
            return f"host {_names(self._roster.busy)} did not end its ranks within {waited_seconds:g} s; end its node"
        missing = _names(self._roster.missing)
        text = f"of {self._hosts} hosts, {missing} did not come to {self._door.address} within {waited_seconds:g} s"
        if self._roster.last_refusal is not None:
            return f"{text}; one that came was refused: {self._roster.last_refusal}"
        if self._door.refusals > 0:
            return f"{text}; {self._door.refusals} connections were refused, which had another key than this node's"
        return f"{text}; start `python -m llmscale.node` there with its --host-index, or look at its log"

    async def _wait(self, max_seconds: float | None) -> None:
        self._changed.clear()
        try:
            await asyncio.wait_for(self._changed.wait(), max_seconds)
        except TimeoutError:
            return

    async def _tick(self) -> None:
        while True:
            before = (self._roster.missing, self._roster.trouble)
            self._send(self._roster.tick(time.monotonic()))
            if before != (self._roster.missing, self._roster.trouble):
                self._changed.set()
            await asyncio.sleep(BEAT_SECONDS / 2)

    def _hear(self) -> None:
        before = self._roster.missing
        for peer in self._door.take_ended():
            self._roster.disconnected(peer)
        for peer, frame in self._door.take():
            try:
                message = decode_follower(frame)
            except TransportError as error:
                # A package of another version may have other messages; this one it can read.
                self._send([(peer, Refused(f"{error}; start every host of a replica with the same package"))])
                self._door.ignore(peer)
                continue
            self._send(self._roster.hear(time.monotonic(), peer, message))
        for host in set(before) - set(self._roster.missing):
            _log.info("a host joined", host=host)
        for host in set(self._roster.missing) - set(before):
            _log.warning("a host left", host=host)
        self._changed.set()

    def _send(self, outgoing: Outgoing) -> None:
        for peer, message in outgoing:
            if isinstance(message, Refused):
                _log.warning("a host was refused", reason=message.reason)
            self._door.send(peer, encode(message))


def _names(hosts: tuple[int, ...]) -> str:
    return ", ".join(str(host) for host in hosts)
