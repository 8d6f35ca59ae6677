"""A replica of several ranks in one process: a thread per rank, each with its own weights, KV region and executor.

The ranks meet through the memory that ranks of one host share, stages through queues. It is an `Executor`, so whatever
drives one rank drives many: the rows that are dealt to the ranks of the last stage are put together again.
"""

from __future__ import annotations

import os
import queue
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from llmscale._core import CpuKernels, RankMemory
from llmscale.layers.native import NativeOps
from llmscale.models.loader import LoadOptions, load_weights
from llmscale.models.registry import describe_model
from llmscale.models.shard import RankPlace, shard_model
from llmscale.parallel.tensor import Alone, CoreGroup, TensorGroup
from llmscale.worker.executor_torch import Ranks, TorchExecutor
from llmscale.worker.kv_region import KvRegion, kv_layout
from llmscale.worker.step import StepInputs, StepLimits

ROOM_BYTES = 4_096
PATIENCE_SECONDS = 60


class QueueLink:
    """A stage's ends of the queues between stages of one tensor rank."""

    def __init__(self, before: queue.Queue[Tensor] | None, behind: queue.Queue[Tensor] | None) -> None:
        self._before = before
        self._behind = behind

    def receive_stream(self, out: Tensor) -> None:
        assert self._before is not None
        out.copy_(self._before.get(timeout=PATIENCE_SECONDS))

    def send_stream(self, stream: Tensor) -> None:
        assert self._behind is not None
        self._behind.put(stream.clone())

    def take_waited_ns(self) -> int:
        raise AssertionError("an executor does not report")

    def send_tokens(self, tokens: Tensor) -> None:
        raise AssertionError("an executor does not sample")

    def receive_tokens(self, out: Tensor) -> None:
        raise AssertionError("an executor does not sample")


class RankThreads:
    """All ranks of a replica."""

    def __init__(
        self, folder: Path, tensor_size: int, stages: int, dtype: str, blocks: int, limits: StepLimits
    ) -> None:
        self._pool = ThreadPoolExecutor(tensor_size * stages)
        self._memory = [_shared_file(tensor_size) for _ in range(stages)]
        links: list[list[queue.Queue[Tensor]]] = [
            [queue.Queue() for _ in range(stages - 1)] for _ in range(tensor_size)
        ]
        self.region: KvRegion
        self.executors: list[TorchExecutor] = []
        for rank in range(tensor_size * stages):
            place = RankPlace.of_rank(rank, tensor_size, stages)
            queues = links[place.tensor_rank]
            link = QueueLink(
                queues[place.stage - 1] if place.stage > 0 else None,
                queues[place.stage] if place.stage < stages - 1 else None,
            )
            self.executors.append(self._executor(folder, place, link, dtype, blocks, limits))
        self._last = self.executors[-tensor_size:]

    def _executor(
        self, folder: Path, place: RankPlace, link: QueueLink, dtype: str, blocks: int, limits: StepLimits
    ) -> TorchExecutor:
        model = describe_model(folder)
        part = shard_model(model.spec, place)
        weights = load_weights(model.folder, model.spec, LoadOptions(dtype=dtype), part)
        self.region = KvRegion(kv_layout(part.spec, weights.dtype), blocks)
        ranks = Ranks(self._group(place, dtype), link, part.vocabulary_start, part.vocabulary_widths)
        ops = NativeOps(CpuKernels(dtype, threads=1))
        return TorchExecutor(part.spec, weights, self.region, ops, limits, ranks)

    def _group(self, place: RankPlace, dtype: str) -> TensorGroup:
        if place.tensor_size == 1:
            return Alone()
        path = f"/proc/self/fd/{self._memory[place.stage]}"
        memory = RankMemory(path, place.tensor_rank, place.tensor_size, ROOM_BYTES, dtype)
        return CoreGroup(memory, place.tensor_rank, place.tensor_size)

    def forward(self, step: StepInputs) -> Tensor:
        """See `Executor`."""
        results = [running.result() for running in [self._pool.submit(one.forward, step) for one in self.executors]]
        last = results[-len(self._last) :]
        return last[0] if len(last) == 1 else torch.cat(last)

    def close(self) -> None:
        """Ends the threads."""
        self._pool.shutdown()
        for descriptor in self._memory:
            os.close(descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _shared_file(ranks: int) -> int:
    descriptor = os.memfd_create("llmscale-test-ranks")
    os.ftruncate(descriptor, RankMemory.bytes_for(ranks, ROOM_BYTES))
    return descriptor
