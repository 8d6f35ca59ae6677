"""The worker's part of the host tier: maps its memory and makes the copies that a step's delta lists.

The memory is a file that a node owns and that outlives workers, or one of this process's own. What lies in it is kept
if it means the same to this worker: same numerics, same layout of blocks, same rank. Copies are made by the core, one
after the other, before the step's rows, each linear in its bytes. Does not know what a block holds or who wants it
back.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import astuple
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from llmscale._core import DiskRegion, HostRegion
from llmscale.models.shard import RankPlace
from llmscale.parallel.assignment import DiskPlace
from llmscale.worker.disk_tier import open_disk
from llmscale.worker.kv_layout import BlockMemory

if TYPE_CHECKING:
    from llmscale.devices.interface import Accelerator
    from llmscale.worker.device_tier import Copy, DeviceTier


class CopySource(Protocol):
    """Whoever owns a mirror: a worker's session or a local replica."""

    def copy_blocks(self, host: HostRegion, kv: tuple[int, int], disk: DiskRegion | None = None) -> bool:
        """Makes the current step's copies and begins its transfers; False if host blocks are bad: it was given up."""

    def copies(self, disk: DiskRegion | None = None) -> list[Copy]:
        """The current step's copies, for a device that makes them, once transfers that they touch have ended."""

    def copies_made(self, took_ns: int, bad_host_blocks: Sequence[int], disk: DiskRegion | None = None) -> bool:
        """A device makes them; begins transfers. False as in `copy_blocks`."""


class HostTier:
    """`blocks` places for blocks of a KV region in the CPU's memory."""

    def __init__(
        self,
        region: BlockMemory,
        blocks: int,
        numerics: str,
        place: RankPlace,
        path: str | None,
        accelerator: Accelerator | None = None,
        disk: tuple[DiskPlace, int] | None = None,
    ) -> None:
        """`path` is an empty file or one of a worker before; None for memory that ends with this process. A region
        that is not the processor's is copied by its accelerator.

        `disk` is where what the host has no room for goes, and how many blocks. Raises WorkerError if memory cannot be
        mapped, ConfigError if the disk cannot be used.
        """
        self._kv = region.memory
        meaning = repr((numerics, astuple(region.layout), astuple(place), disk and disk[0].content))
        layout = int.from_bytes(hashlib.blake2b(meaning.encode(), digest_size=8).digest(), "little")
        block_bytes = region.layout.block_bytes
        own = None if path is not None else os.memfd_create("llmscale-host-tier", os.MFD_CLOEXEC)
        path = path or f"/proc/self/fd/{own}"
        try:
            _give_size(path, HostRegion.bytes_for(blocks, block_bytes))
            self._host = HostRegion(path, blocks, block_bytes, layout)
            self.disk = None if disk is None else open_disk(*disk, (path, blocks), block_bytes, layout)
            self._apart = None if accelerator is None else _apart(accelerator, region, self._host, blocks)
        finally:
            if own is not None:
                os.close(own)

    @property
    def incarnation(self) -> int:
        """Another memory has another number."""
        return self._host.incarnation

    @property
    def disk_files(self) -> int:
        """The same of the disk tier's file; 0 without one."""
        return 0 if self.disk is None else self.disk.incarnation

    def copy(self, source: CopySource, *, has_transfers: bool) -> bool:
        """Makes the copies of the current step and begins its transfers to and from the disk, if it has any. False: it
        was given up, and whoever plans knows."""
        if self._apart is not None:
            return self._apart.copy(source, self.disk, has_transfers=has_transfers)
        return source.copy_blocks(self._host, self._kv, self.disk)

    def rest(self) -> None:
        """To be called when there is nothing else to do."""
        if self._apart is not None:
            self._apart.seal()


def _apart(accelerator: Accelerator, region: BlockMemory, host: HostRegion, blocks: int) -> DeviceTier:
    """Imported here: only devices apart have one, and it needs torch."""
    from llmscale.worker.device_tier import DeviceTier
    from llmscale.worker.kv_region import KvRegion

    assert isinstance(region, KvRegion), "a device's region is a tensor"
    return DeviceTier(accelerator, region, host, blocks)


def _give_size(path: str, size_bytes: int) -> None:
    """Another size means another layout, and that nothing in it is of use; no other process has it mapped then."""
    if Path(path).stat().st_size != size_bytes:
        os.truncate(path, 0)
        os.truncate(path, size_bytes)
