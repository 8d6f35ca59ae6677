"""The host tier of a device apart: blocks leave and come back on streams of their own, headers are the processor's.

A step's copies are done in their order: a run of one direction after the other, behind all steps before and before the
step's own rows, which the device waits for and nobody else. A header is cleared before a copy to its block begins and
sealed, which hashes the bytes, once an event says that the copy has ended: at the next step with copies, or when the
worker rests. Sealing within the step would hold its launch up by the time of the transfer. A block that is wanted back
before that is waited for. What a death cuts off has no header, and is a miss. Before a block comes back its bytes are
checked where they lie. O(blocks) calls and one hash each. It does not know what a block holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Protocol

import torch
from torch import Tensor

from llmscale._core import DiskRegion, HostRegion
from llmscale.devices.interface import Accelerator, Event, Stream
from llmscale.logs import get_logger
from llmscale.worker.kv_region import KvRegion

_log = get_logger("llmscale.worker")

MAX_CALIBRATION_NS = 200_000_000
"""Of a start that takes seconds for weights; two directions of 4 MiB blocks take 50 ms at 50 GB/s."""

Copy = tuple[bool, int, int, int]
"""Whether it comes back from the host, block, host block, tag."""


class CopyList(Protocol):
    """Whoever owns a mirror."""

    def copies(self, disk: DiskRegion | None = None) -> list[Copy]:
        """Of the current step, in order, once transfers that they touch have ended."""

    def copies_made(self, took_ns: int, bad_host_blocks: Sequence[int], disk: DiskRegion | None = None) -> bool:
        """The copies are under way, and take as long; transfers begin. False if blocks are bad and the step was given
        up."""


@dataclass(frozen=True, slots=True)
class _Unsealed:
    """Blocks on their way to the host, and the event behind them."""

    tags: dict[int, int]
    """by host block"""
    ended: Event


class DeviceTier:
    """Copies between a KV region on a device and the host's part of a rank."""

    def __init__(self, accelerator: Accelerator, region: KvRegion, host: HostRegion, blocks: int) -> None:
        self._accelerator = accelerator
        self._host = host
        self._blocks = region.tensor.view(torch.uint8).view(region.blocks, region.layout.block_bytes)
        # Kept: the memory is pinned as long as this object lives, views of it do not count.
        self._memory = accelerator.register(*host.memory())
        first = host.address(0) - host.memory()[0]
        stride = (host.address(1) if blocks > 1 else host.address(0) + region.layout.block_bytes) - host.address(0)
        size = region.layout.block_bytes
        self._rooms = torch.as_strided(self._memory, (blocks, size), (stride, 1), first)
        if self._rooms.is_contiguous():
            # Pages divide a block's place, and most blocks are whole pages; others are copied one by one.
            found = accelerator.calibrate_copies(size, MAX_CALIBRATION_NS)
            _log.info("block copies", ways=found, block_kb=size >> 10)
        self._unsealed: list[_Unsealed] = []
        self._restored: Event | None = None
        """Behind the last blocks that come back, until somebody has waited for it."""
        self._measured: tuple[Event, Event, int] | None = None
        self._block_ns = 0

    def copy(self, source: CopyList, disk: DiskRegion | None = None, *, has_transfers: bool = False) -> bool:
        """Begins the copies of the current step. False: it was given up, and whoever plans knows.

        `has_transfers` says whether it also moves blocks between host and disk.
        """
        self.seal()
        self._measure()
        accelerator = self._accelerator
        last = accelerator.compute.record()
        began = last
        runs = [(back, list(run)) for back, run in groupby(source.copies(disk), key=lambda copy: copy[0])]
        bad: list[int] = []
        count = 0
        for back, run in runs:
            if back:
                bad += self._bad_blocks(run)
                if bad:
                    break
            last = self._restore(run, last) if back else self._offload(run, last)
            count += len(run)
        accelerator.compute.wait_for(last)
        self._measured = (began, last, count) if count > 0 else None
        if has_transfers:
            # A transfer writes a block that is sealed, or reads one into a place that nobody seals afterwards.
            while self._unsealed:
                self._seal_oldest()
            # It may also read one into the place of a block that the device has yet to fetch.
            if self._restored is not None:
                self._restored.wait()
                self._restored = None
        return source.copies_made(self._block_ns * count, bad, disk)

    def seal(self) -> None:
        """Writes the headers of blocks that have arrived."""
        while self._unsealed and self._unsealed[0].ended.is_done:
            self._seal_oldest()

    def _offload(self, run: Sequence[Copy], after: Event) -> Event:
        tags = {host: tag for _, _, host, tag in run}
        for unsealed in self._unsealed:
            # Another block goes there now; the header is for that one.
            for host in tags:
                unsealed.tags.pop(host, None)
        for host in tags:
            self._host.clear(host)
        stream = self._accelerator.offload
        ended = _copied(stream, after, self._blocks, self._rooms, [(block, host) for _, block, host, _ in run])
        self._unsealed.append(_Unsealed(tags, ended))
        return ended

    def _restore(self, run: Sequence[Copy], after: Event) -> Event:
        stream = self._accelerator.restore
        pairs = [(host, block) for _, block, host, _ in run]
        self._restored = _copied(stream, after, self._rooms, self._blocks, pairs)
        return self._restored

    def _bad_blocks(self, run: Sequence[Copy]) -> list[int]:
        """Host blocks that do not hold what they should, once what is on its way there has arrived."""
        wanted = {host for _, _, host, _ in run}
        while any(wanted & unsealed.tags.keys() for unsealed in self._unsealed):
            self._seal_oldest()
        return [host for _, _, host, tag in run if not self._host.agrees(host, tag)]

    def _seal_oldest(self) -> None:
        unsealed = self._unsealed.pop(0)
        unsealed.ended.wait()
        for host, tag in unsealed.tags.items():
            self._host.seal(host, tag)

    def _measure(self) -> None:
        """What a block took in the last copies. Those of now are not done yet, so their time is told by these."""
        if self._measured is not None and self._measured[1].is_done:
            began, ended, blocks = self._measured
            self._block_ns = max(0, ended.elapsed_ns_since(began)) // blocks
            self._measured = None


def _copied(stream: Stream, after: Event, source: Tensor, target: Tensor, pairs: Sequence[tuple[int, int]]) -> Event:
    """Copies behind an event; returns the one behind them. Of several to one place, as when a step evicts more than the
    host has room for, the last counts, and copies of one call have no order."""
    sources = {place: block for block, place in pairs}
    stream.wait_for(after)
    stream.copy_blocks(source, target, [(block, place) for place, block in sources.items()])
    return stream.record()
