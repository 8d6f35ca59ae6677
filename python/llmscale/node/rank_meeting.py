"""Where the ranks of one epoch meet on this host: memory per stage for sums, and channels between stages.

The memory has no name in the file system: ranks open it through this process's descriptors, so nothing is left behind
however the node ends. Ranks of other hosts are met over torch.distributed at a rendezvous that was made elsewhere. It
does not know what ranks exchange.
"""

from __future__ import annotations

import os
from typing import Self

from llmscale._core import RankChannel, RankMemory
from llmscale.models.shard import RankPlace
from llmscale.parallel.assignment import ROOM_BYTES, Meeting
from llmscale.parallel.layout import HostLayout

# Beyond the longest step: the engine ends a group whose step takes too long and says which one; ranks that wait for
# each other end by themselves only where it does not.
GRACE_SECONDS = 60.0


class RankMeeting:
    """Owns what the ranks of one host and epoch meet in. Closed when they are gone, or have all mapped it."""

    def __init__(
        self,
        layout: HostLayout,
        host: int = 0,
        rendezvous: str | None = None,
        *,
        computes_apart: bool = False,
        max_step_seconds: float = 120.0,
    ) -> None:
        """`max_step_seconds` is how long a step may take at most. `rendezvous` is needed where the layout has several
        hosts, and where ranks compute apart from the processor: those meet there alone."""
        assert rendezvous is not None or layout.hosts == 1, "ranks of several hosts need a rendezvous"
        self._layout = layout
        self._rendezvous = rendezvous
        # A stage gets its step when the first one does, and waits for all before it.
        self._max_exchange_seconds = max_step_seconds + GRACE_SECONDS
        self._memory: list[int] = []
        # By stage.
        self._sums: dict[int, int] = {}
        # By sending and receiving rank: from each stage to the next, and from the last one back to the first.
        self._channels: dict[tuple[int, int], int] = {}
        if computes_apart:
            return
        for place in layout.places(host):
            self._prepare(place)

    def of(self, place: RankPlace) -> Meeting:
        """What a rank is told."""
        before, behind, first, last = _neighbours(place)
        samples = None
        if place.is_first_stage:
            samples = self._channel(last, place.rank)
        elif place.is_last_stage:
            samples = self._channel(place.rank, first)
        return Meeting(
            self._path(self._sums.get(place.stage)),
            before=None if place.is_first_stage else self._channel(before, place.rank),
            behind=None if place.is_last_stage else self._channel(place.rank, behind),
            samples=samples,
            rendezvous=self._rendezvous,
            max_exchange_seconds=self._max_exchange_seconds,
        )

    def close(self) -> None:
        """Gives the memory up; ranks that have mapped it keep it."""
        while self._memory:
            os.close(self._memory.pop())
        self._sums.clear()
        self._channels.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _prepare(self, place: RankPlace) -> None:
        layout = self._layout
        together = layout.are_together(layout.stage_ranks(place.stage))
        if place.tensor_size > 1 and place.stage not in self._sums and together:
            self._sums[place.stage] = self._new(RankMemory.bytes_for(place.tensor_size, ROOM_BYTES))
        if place.stages == 1:
            return
        _, behind, first, _ = _neighbours(place)
        receiver = first if place.is_last_stage else behind
        if layout.host_of(receiver) == layout.host_of(place.rank):
            self._channels[place.rank, receiver] = self._new(RankChannel.BYTES)

    def _new(self, size_bytes: int) -> int:
        descriptor = os.memfd_create("llmscale-ranks", os.MFD_CLOEXEC)
        self._memory.append(descriptor)
        os.ftruncate(descriptor, size_bytes)
        return descriptor

    def _channel(self, sender: int, receiver: int) -> str | None:
        return self._path(self._channels.get((sender, receiver)))

    @staticmethod
    def _path(descriptor: int | None) -> str | None:
        return None if descriptor is None else f"/proc/{os.getpid()}/fd/{descriptor}"


def _neighbours(place: RankPlace) -> tuple[int, int, int, int]:
    """Ranks of the same number in the stage before, the one behind, the first and the last."""
    last = (place.stages - 1) * place.tensor_size + place.tensor_rank
    return place.rank - place.tensor_size, place.rank + place.tensor_size, place.tensor_rank, last
