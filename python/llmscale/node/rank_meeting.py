"""Where the ranks of one epoch meet on this host: shared memory per stage, and a file for torch.distributed.

The memory has no name in the file system: ranks open it through this process's descriptors, so nothing is left behind
however the node ends. It does not know what ranks exchange.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Self

from llmscale._core import RankMemory
from llmscale.models.shard import RankPlace
from llmscale.parallel.assignment import ROOM_BYTES, Meeting


class RankMeeting:
    """Owns what the ranks of one epoch meet in. Closed when they are gone, or have all mapped it."""

    def __init__(self, epoch: int, tensor_size: int, stages: int, folder: Path) -> None:
        self._rendezvous = None if stages == 1 else str(folder / f"ranks-{epoch}")
        self._descriptors = [_memory(tensor_size) for _ in range(stages)] if tensor_size > 1 else []

    def of(self, place: RankPlace) -> Meeting:
        """What a rank is told."""
        memory = f"/proc/{os.getpid()}/fd/{self._descriptors[place.stage]}" if self._descriptors else None
        return Meeting(memory, self._rendezvous)

    def close(self) -> None:
        """Gives the memory up; ranks that have mapped it keep it."""
        while self._descriptors:
            os.close(self._descriptors.pop())
        if self._rendezvous is not None:
            Path(self._rendezvous).unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _memory(ranks: int) -> int:
    descriptor = os.memfd_create("llmscale-ranks", os.MFD_CLOEXEC)
    os.ftruncate(descriptor, RankMemory.bytes_for(ranks, ROOM_BYTES))
    return descriptor
