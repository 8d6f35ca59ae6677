"""The leader's view of the other hosts of its replica: who is there, who fits, what runs there, and what is wrong.

A state machine without clock, socket or thread: frames and times in, messages out, O(hosts) at most. The truth about
which epoch should run is the leader's; what a follower reports is compared with it. A host that says nothing for two
seconds is gone, and so is what runs there. It does not start anything.
"""

from __future__ import annotations

from dataclasses import dataclass

from llmscale.node.group_messages import (
    FollowerMessage,
    Goodbye,
    HostFacts,
    LeaderMessage,
    Leave,
    RankLink,
    Refused,
    Report,
    Wanted,
    bounded,
    difference,
)

BEAT_SECONDS = 0.25
MAX_SILENCE_SECONDS = 2.0

Outgoing = list[tuple[int, LeaderMessage]]
"""(peer, message)"""


@dataclass(slots=True)
class _Host:
    """One follower that fits."""

    peer: int
    incarnation: str
    heard_at: float
    running_epoch: int = 0
    """Whose ranks run there, as it says; 0 for none."""
    is_connected: bool = True
    """False from when its connection has ended until it is heard over the next one."""


class Roster:
    """See the module."""

    def __init__(self, incarnation: str, facts: HostFacts, kv_blocks: int) -> None:
        self._incarnation = incarnation
        self._facts = facts
        self._kv_blocks = kv_blocks
        self._hosts: dict[int, _Host] = {}
        # Since when another process claims an index that is taken, by index.
        self._rivals: dict[int, tuple[str, float]] = {}
        self._epoch = 0
        self._links: dict[int, tuple[RankLink, ...]] = {}
        self._rendezvous_port = 0
        self._serving = False
        self._draining = False
        self._trouble: str | None = None
        self._next_beat = 0.0
        self.last_refusal: str | None = None
        """Why the last host that did not fit was sent away."""

    @property
    def missing(self) -> tuple[int, ...]:
        """Hosts that have not come, or have gone."""
        there = {index for index, host in self._hosts.items() if host.is_connected}
        return tuple(host for host in range(1, self._facts.hosts) if host not in there)

    @property
    def busy(self) -> tuple[int, ...]:
        """Hosts that still run ranks of an epoch that is over: memory that the next one needs."""
        return tuple(index for index, host in sorted(self._hosts.items()) if host.running_epoch and not self._links)

    @property
    def trouble(self) -> str | None:
        """Why the ranks of the current epoch cannot go on, as far as other hosts know; None while they can."""
        return self._trouble

    def run(self, epoch: int, links: dict[int, tuple[RankLink, ...]], rendezvous_port: int) -> Outgoing:
        """From now on this epoch's ranks should run, by host. All hosts are there."""
        assert epoch > self._epoch, (epoch, self._epoch)
        self._epoch, self._links, self._rendezvous_port = epoch, links, rendezvous_port
        self._serving, self._trouble = False, None
        if self.missing:
            self._trouble = f"host {self.missing[0]} went before it was told"
        return self._tell_all()

    def serve(self) -> Outgoing:
        """The group is loaded."""
        self._serving = True
        return self._tell_all()

    def drain(self) -> Outgoing:
        """The leader has been asked to end, and ends when what runs has ended."""
        self._draining = True
        return self._tell_all()

    def rest(self) -> Outgoing:
        """From now on nothing should run."""
        self._links = {}
        self._serving = False
        return self._tell_all()

    def end(self) -> Outgoing:
        """The leader ends."""
        return [(host.peer, Goodbye(self._incarnation)) for host in self._hosts.values()]

    def hear(self, now: float, peer: int, message: FollowerMessage) -> Outgoing:
        """A follower said something. A message of a process that is not of the group changes nothing here."""
        if isinstance(message, Leave):
            known = self._hosts.get(message.host)
            if known is not None and known.incarnation == message.incarnation:
                self._lose(message.host, f"host {message.host} was told to end")
            return []
        return self._hear_report(now, peer, message)

    def disconnected(self, peer: int) -> None:
        """A connection has ended. Its host may be back before it is missed; until then it cannot be told anything."""
        for host in self._hosts.values():
            if host.peer == peer:
                host.is_connected = False

    def tick(self, now: float) -> Outgoing:
        """Beats, and looks for hosts that are silent. Called several times per beat."""
        for index, host in list(self._hosts.items()):
            silent = now - host.heard_at
            if silent > MAX_SILENCE_SECONDS:
                self._lose(index, f"host {index} has said nothing for {silent:.1f} s")
        if now < self._next_beat:
            return []
        self._next_beat = now + BEAT_SECONDS
        return self._tell_all()

    def _hear_report(self, now: float, peer: int, report: Report) -> Outgoing:
        reason = self._misfit(report)
        if reason is not None:
            return self._refuse(peer, reason)
        host = self._hosts.get(report.host)
        if host is not None and host.incarnation != report.incarnation:
            if host.is_connected:
                return self._hear_rival(now, peer, report)
            self._lose(report.host, f"host {report.host} was started anew")
            host = None
        is_new = host is None
        if host is None:
            host = self._hosts[report.host] = _Host(peer, report.incarnation, now)
            self._rivals.pop(report.host, None)
        host.heard_at = now
        # A connection that was lost and made again has another number.
        host.peer, host.is_connected = peer, True
        running = report.epoch if report.death is None else 0
        changed = is_new or host.running_epoch != running
        host.running_epoch = running
        if report.epoch == self._epoch and self._links and report.death is not None:
            self._note(f"host {report.host}: {report.death}")
        return [(peer, self._wanted(report.host))] if changed else []

    def _hear_rival(self, now: float, peer: int, report: Report) -> Outgoing:
        """Another process of the same index: the next one after a death that is not noticed yet, or one too many."""
        rival, since = self._rivals.get(report.host, (report.incarnation, now))
        self._rivals[report.host] = (report.incarnation, since if rival == report.incarnation else now)
        if rival == report.incarnation and now - since > MAX_SILENCE_SECONDS:
            reason = (
                f"host index {report.host} is taken by another process, which is alive; give every host of the replica"
                " an index of its own (--host-index)"
            )
            return self._refuse(peer, reason)
        return []

    def _refuse(self, peer: int, reason: str) -> Outgoing:
        self.last_refusal = bounded(reason)
        return [(peer, Refused(self.last_refusal))]

    def _misfit(self, report: Report) -> str | None:
        reason = difference(self._facts, report.host, report.facts)
        if reason is not None:
            return reason
        if not 1 <= report.host < self._facts.hosts:
            return f"host index {report.host} does not exist; followers of {self._facts.hosts} hosts begin with 1"
        if report.max_kv_blocks < self._kv_blocks:
            return (
                f"host {report.host} cannot join: it has memory for {report.max_kv_blocks:,} KV blocks, the leader"
                f" plans {self._kv_blocks:,} on every rank; set the same --kv-cache-bytes on every host"
            )
        return None

    def _lose(self, index: int, reason: str) -> None:
        del self._hosts[index]
        if self._links:
            self._note(reason)

    def _note(self, reason: str) -> None:
        # What came first is the cause; the rest follows from it.
        self._trouble = self._trouble or reason

    def _wanted(self, host: int) -> Wanted:
        links = self._links.get(host, ())
        port = self._rendezvous_port if links else 0
        return Wanted(self._incarnation, self._epoch, links, port, self._serving, self._draining)

    def _tell_all(self) -> Outgoing:
        return [(host.peer, self._wanted(index)) for index, host in sorted(self._hosts.items())]
