"""The memory of the host tier: one file without a name per rank of this host, which outlives the workers that map it.

A worker that dies leaves what it has copied there to the next one. The files are empty until a worker gives them their
size, and their pages take no memory until they are written. Does not know what lies in them.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from llmscale.models.shard import RankPlace


class HostMemory:
    """Owned by a node for as long as it lives; the kernel frees the memory with its last user."""

    def __init__(self, places: Sequence[RankPlace]) -> None:
        self._files = {place.rank: os.memfd_create("llmscale-host-tier", os.MFD_CLOEXEC) for place in places}

    def path_of(self, place: RankPlace) -> str:
        """Where a worker of this rank opens it: through this process's descriptors."""
        return f"/proc/{os.getpid()}/fd/{self._files[place.rank]}"

    def close(self) -> None:
        """Gives the memory up; a worker that has mapped it keeps it."""
        while self._files:
            os.close(self._files.popitem()[1])
