"""A follower's view of its group: what the leader wants to run here, and whether there is a leader at all.

A state machine without clock, socket or thread. The leader's latest word holds; a leader that says nothing for two
seconds, says goodbye, or is another process than before wants nothing to run. O(1) per message. It does not start or
end processes, and it does not know what a rank is.
"""

from __future__ import annotations

from llmscale.config import MAX_DRAIN_SECONDS
from llmscale.node.group_messages import (
    FollowerMessage,
    Goodbye,
    HostFacts,
    LeaderMessage,
    Leave,
    Refused,
    Report,
    Wanted,
)
from llmscale.node.roster import BEAT_SECONDS, MAX_SILENCE_SECONDS

# A launcher asks all hosts of a group to end, one after the other.
SIGNALS_SECONDS = 2.0


class Membership:
    """See the module."""

    def __init__(self, host: int, incarnation: str, facts: HostFacts, kv_blocks: int, now: float) -> None:
        self._host = host
        self._incarnation = incarnation
        self._facts = facts
        self._kv_blocks = kv_blocks
        self._leader: str | None = None
        self._heard_at = now
        self._wanted: Wanted | None = None
        self._draining = False
        self._epoch = 0
        self._death: str | None = None
        self._next_report = now
        self.refusal: str | None = None
        """Why the leader does not take this host."""

    @property
    def wanted(self) -> Wanted | None:
        """What should run; None for nothing."""
        return self._wanted

    @property
    def serving(self) -> bool:
        """Whether the group has loaded."""
        return self._wanted is not None and self._wanted.serving

    @property
    def has_leader(self) -> bool:
        """Whether a leader has spoken lately."""
        return self._leader is not None

    def leaderless_seconds(self, now: float) -> float:
        """How long no leader has spoken."""
        return now - self._heard_at

    def is_needed(self, asked_seconds: float) -> bool:
        """Whether ranks should go on though this host was asked to end, so long ago: while the leader drains with them,
        and as long as it may yet be asked to. A host that is asked alone is not missed longer for that."""
        if self._draining:
            # Also between two epochs: a rank may die during a drain, and the next group needs this host.
            return asked_seconds <= SIGNALS_SECONDS + MAX_DRAIN_SECONDS
        return self._wanted is not None and asked_seconds <= SIGNALS_SECONDS

    def started(self, epoch: int) -> None:
        """Ranks of this epoch run now."""
        self._epoch, self._death = epoch, None
        self._next_report = 0.0

    def ended(self, epoch: int, death: str | None) -> None:
        """They do no more; by themselves, if there is a death to tell."""
        if epoch != self._epoch:
            return
        self._death = death
        if death is None:
            self._epoch = 0
        self._next_report = 0.0

    def hear(self, now: float, message: LeaderMessage) -> None:
        """The leader said something."""
        if isinstance(message, Refused):
            self.refusal = message.reason
            return
        if isinstance(message, Goodbye):
            if message.incarnation == self._leader:
                self._forget()
            return
        if message.incarnation != self._leader:
            self._forget()
            self._leader = message.incarnation
            if self._death is not None:
                # Its epochs count from 1 again: a death under the last leader would end the first of them.
                self._epoch, self._death = 0, None
        self._heard_at = now
        self._wanted = message if message.links else None
        self._draining = message.draining

    def tick(self, now: float) -> FollowerMessage | None:
        """Notices a leader that is silent; what to tell, if it is time. Called several times per beat."""
        if self._leader is not None and now - self._heard_at > MAX_SILENCE_SECONDS:
            self._forget()
        if now < self._next_report:
            return None
        self._next_report = now + BEAT_SECONDS
        return Report(self._host, self._incarnation, self._facts, self._kv_blocks, self._epoch, self._death)

    def leave(self) -> FollowerMessage:
        """The last word."""
        return Leave(self._host, self._incarnation)

    def _forget(self) -> None:
        self._leader = None
        self._wanted = None
        self._draining = False
