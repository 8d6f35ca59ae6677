"""What a worker runs: a model's executor with its KV region and kernels, and the step buffers of a mirror as tensors.

Built once per process. A step costs eight slices and one forward pass; nothing runs per token or per sequence in
Python. It does not know where steps come from or who samples.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from llmscale import env
from llmscale._core import CpuKernels, EngineLimits, Int32Buffer, StepCounts
from llmscale.errors import ConfigError
from llmscale.layers.native import NativeOps
from llmscale.models.loader import LoadOptions, load_weights
from llmscale.models.open_files import Progress
from llmscale.models.registry import describe_model
from llmscale.models.shard import RankPlace, shard_model
from llmscale.parallel.assignment import DiskPlace, Meeting
from llmscale.parallel.groups import join_stages, join_tensor_group, join_world
from llmscale.parallel.interface import interface_towards
from llmscale.worker.executor_torch import Ranks, TorchExecutor
from llmscale.worker.host_tier import CopySource, HostTier
from llmscale.worker.kv_region import KvRegion, kv_layout
from llmscale.worker.step import StepInputs, StepLimits


class StepSource(Protocol):
    """Whoever owns a mirror: a worker's session or a local replica."""

    def buffer(self, name: str) -> Int32Buffer:
        """One of the mirror's buffers."""


class StepBuffers:
    """The mirror's buffers, wrapped once."""

    def __init__(self, source: StepSource) -> None:
        def wrap(name: str) -> Tensor:
            return torch.frombuffer(source.buffer(name), dtype=torch.int32)

        self._token_ids = wrap("token_ids")
        self._positions = wrap("positions")
        self._slot_mapping = wrap("slot_mapping")
        self._query_start = wrap("query_start")
        self._sequence_lengths = wrap("sequence_lengths")
        self._table_offsets = wrap("table_offsets")
        self._block_tables = wrap("block_tables")
        self._sample_rows = wrap("sample_rows")

    def inputs(self, counts: StepCounts) -> StepInputs:
        """Views of what the current step uses."""
        rows, sequences, samples = counts.rows, counts.sequences, counts.samples
        return StepInputs(
            rows=rows,
            sequences=sequences,
            samples=samples,
            token_ids=self._token_ids[:rows],
            positions=self._positions[:rows],
            slot_mapping=self._slot_mapping[:rows],
            query_start=self._query_start[: sequences + 1],
            sequence_lengths=self._sequence_lengths[:sequences],
            table_offsets=self._table_offsets[:sequences],
            block_tables=self._block_tables,
            sample_rows=self._sample_rows[:samples],
        )


class ModelRunner:
    """A loaded model, or a rank's part of it, on the CPU."""

    def __init__(
        self,
        folder: Path,
        dtype: str,
        limits: EngineLimits,
        *,
        quantization: str | None = None,
        threads: int | None = None,
        progress: Progress | None = None,
        place: RankPlace | None = None,
        meeting: Meeting | None = None,
        host_memory: str | None = None,
        disk: DiskPlace | None = None,
    ) -> None:
        """Meets the other ranks, loads weights, makes the KV region. Raises ModelError, ConfigError, WorkerError."""
        self.place = place = place or RankPlace()
        meeting = meeting or Meeting()
        if meeting.rendezvous is not None:
            env.prepare_for_torch_distributed(interface_towards(meeting.rendezvous))
        world = join_world(place, meeting, env.GLOO_INTERFACE.read() or "lo")
        description = describe_model(folder, quantization)
        part = shard_model(description.spec, place)
        options = LoadOptions(dtype=dtype, progress=progress)
        weights = load_weights(description.folder, description.spec, options, part)
        self.dtype = "bfloat16" if weights.dtype is torch.bfloat16 else "float32"
        self.kernels = CpuKernels(self.dtype, threads=threads, level=env.CPU_LEVEL.read())
        torch.set_num_threads(self.kernels.threads)
        layout = kv_layout(part.spec, weights.dtype, limits.block_tokens)
        self.region = KvRegion(layout, limits.total_blocks)
        step_limits = StepLimits(
            max_step_tokens=limits.max_step_tokens,
            max_sequences=limits.max_sequences,
            max_sequence_tokens=limits.max_sequence_tokens,
        )
        self.stage = join_stages(place, meeting, world)
        self.tensor = join_tensor_group(place, meeting, self.dtype, world)
        ranks = Ranks(self.tensor, self.stage, part.vocabulary_start, part.vocabulary_widths)
        self._executor = TorchExecutor(part.spec, weights, self.region, NativeOps(self.kernels), step_limits, ranks)
        self._logits: Tensor | None = None
        self.layers = len(part.spec.blocks)
        linear = self._executor.linear_kind
        sums = f"{self.tensor.kind}{place.tensor_size}"
        self.numerics = f"torch-{torch.__version__}/{linear}/cpu-{self.kernels.level}/{self.dtype}/{sums}"
        if limits.disk_blocks > 0 and disk is None:
            raise ConfigError("the replica has a disk tier and this host has no folder for it; give every host kv_disk")
        self.host: HostTier | None = None
        if limits.host_blocks > 0:
            below = None if disk is None else (disk, limits.disk_blocks)
            self.host = HostTier(self.region, limits.host_blocks, self.numerics, place, host_memory, below)

    def copy(self, counts: StepCounts, source: CopySource) -> bool:
        """Makes the step's copies between tiers, before its rows are computed. False: the step was given up."""
        if counts.copies == 0 and counts.transfers == 0:
            return True
        assert self.host is not None, "copies are planned only where there is a host tier"
        return self.host.copy(source)

    def forward(self, step: StepInputs) -> tuple[int, int]:
        """Runs one step. Returns address and number of elements of the logits, valid until the next call.

        A step without rows, which only copies blocks, has no logits.
        """
        if step.rows == 0:
            return self.region.tensor.data_ptr(), 0
        # Held until the next step: the sampler reads it by address.
        self._logits = self._executor.forward(step)
        return self._logits.data_ptr(), self._logits.numel()
