"""Where the ranks of one epoch meet on this host: memory per stage for sums, and channels between stages.

The memory has no name in the file system: ranks open it through this process's descriptors, so nothing is left behind
however the node ends. It does not know what ranks exchange.
"""

from __future__ import annotations

import os
from typing import Self

from llmscale._core import RankChannel, RankMemory
from llmscale.models.shard import RankPlace
from llmscale.parallel.assignment import ROOM_BYTES, Meeting


class RankMeeting:
    """Owns what the ranks of one epoch meet in. Closed when they are gone, or have all mapped it."""

    def __init__(self, tensor_size: int, stages: int) -> None:
        sums = RankMemory.bytes_for(tensor_size, ROOM_BYTES)
        self._sums = [_memory(sums) for _ in range(stages)] if tensor_size > 1 else []
        # By tensor rank: from each stage to the next, and from the last one back to the first.
        between = stages if stages > 1 else 0
        self._channels = [[_memory(RankChannel.BYTES) for _ in range(between)] for _ in range(tensor_size)]

    def of(self, place: RankPlace) -> Meeting:
        """What a rank is told."""
        memory = _path(self._sums[place.stage]) if self._sums else None
        channels = [_path(descriptor) for descriptor in self._channels[place.tensor_rank]]
        if not channels:
            return Meeting(memory)
        ends = place.is_first_stage or place.is_last_stage
        return Meeting(
            memory,
            before=None if place.is_first_stage else channels[place.stage - 1],
            behind=None if place.is_last_stage else channels[place.stage],
            samples=channels[-1] if ends else None,
        )

    def close(self) -> None:
        """Gives the memory up; ranks that have mapped it keep it."""
        for descriptors in (self._sums, *self._channels):
            while descriptors:
                os.close(descriptors.pop())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _path(descriptor: int) -> str:
    return f"/proc/{os.getpid()}/fd/{descriptor}"


def _memory(size_bytes: int) -> int:
    descriptor = os.memfd_create("llmscale-ranks", os.MFD_CLOEXEC)
    os.ftruncate(descriptor, size_bytes)
    return descriptor
