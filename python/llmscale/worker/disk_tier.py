"""The worker's part of the disk tier: opens its file below the host tier, and says what goes wrong there, once.

Blocks are moved by a thread of the core beside the steps; a full or broken disk costs cached prefixes and nothing else.
It knows no contents, and costs a step nothing.
"""

from __future__ import annotations

from llmscale._core import DiskRegion
from llmscale.logs import get_logger
from llmscale.parallel.assignment import DiskPlace

_log = get_logger("llmscale.worker")


def open_disk(disk: DiskPlace, blocks: int, host: tuple[str, int], block_bytes: int, layout: int) -> DiskRegion:
    """Opens the file for blocks of the host tier whose memory and size `host` names.

    Raises ConfigError if the file cannot be had or belongs to another process.
    """
    host_path, host_blocks = host
    return DiskRegion(disk.path, blocks, host_path, host_blocks, block_bytes, layout)


def say_trouble(disk: DiskRegion | None) -> None:
    """Logs the first thing that the disk refused."""
    trouble = None if disk is None else disk.take_trouble()
    if trouble is not None:
        _log.warning("the disk tier takes nothing in for now; requests go on without it", reason=trouble)
