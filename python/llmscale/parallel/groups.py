"""How the ranks of one replica find each other, and the groups that come of it.

Ranks of one host meet in shared memory; stages on several hosts meet in torch.distributed, whose store is a file in a
folder that only this user may enter. Every wait has a deadline: a rank that does not come ends the group, never hangs
it. It does not know models beyond the number format, or who starts processes.
"""

from __future__ import annotations

import datetime

import torch.distributed

from llmscale._core import RankMemory
from llmscale.errors import WorkerError
from llmscale.models.shard import RankPlace
from llmscale.parallel.assignment import ROOM_BYTES, Meeting
from llmscale.parallel.pipeline import ChannelStageLink, StageLink, TorchStageLink
from llmscale.parallel.tensor import Alone, SharedMemoryGroup, TensorGroup


def join_tensor_group(place: RankPlace, meeting: Meeting, dtype: str) -> TensorGroup:
    """The ranks that share this one's layers. Raises WorkerError."""
    if place.tensor_size == 1:
        return Alone()
    if meeting.memory is None:
        raise WorkerError(
            f"rank {place.rank} shares its layers with {place.tensor_size - 1} others and was not told where"
        )
    max_wait_us = int(meeting.max_wait_seconds * 1e6)
    memory = RankMemory(
        meeting.memory, place.tensor_rank, place.tensor_size, ROOM_BYTES, dtype, max_wait_us=max_wait_us
    )
    return SharedMemoryGroup(memory, place.tensor_rank, place.tensor_size)


def join_stages(place: RankPlace, meeting: Meeting) -> StageLink | None:
    """The stages before and behind this one, once all ranks of the replica are there. Raises WorkerError."""
    if place.stages == 1:
        return None
    if meeting.rendezvous is None:
        return ChannelStageLink(place, meeting)
    try:
        torch.distributed.init_process_group(
            "gloo",
            init_method=f"file://{meeting.rendezvous}",
            rank=place.rank,
            world_size=place.ranks,
            timeout=datetime.timedelta(seconds=meeting.max_wait_seconds),
        )
    except (RuntimeError, ValueError) as error:
        raise WorkerError(f"rank {place.rank} of {place.ranks} did not meet the others: {error}") from error
    group = torch.distributed.group.WORLD
    assert group is not None, "the default group was just made"
    return TorchStageLink(group, place)
