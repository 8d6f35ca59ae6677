"""What the loop of a worker needs of whatever computes its steps, and the choice between the two that do.

The native runner computes one rank on the processor and needs no torch; the torch runner computes everything else. It
knows neither's insides, and imports only the one that is asked for.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from llmscale._core import CpuKernels, EngineLimits, StepCounts
from llmscale.errors import ConfigError
from llmscale.models.checkpoint import Progress
from llmscale.models.shard import RankPlace
from llmscale.parallel.assignment import DiskPlace, Meeting
from llmscale.worker.host_tier import CopySource, HostTier
from llmscale.worker.kv_layout import BlockMemory
from llmscale.worker.steps import Steps, StepSource

if TYPE_CHECKING:
    from llmscale.devices.interface import Accelerator


class Exchange(Protocol):
    """How one rank of several tells the others what it has drawn."""

    @property
    def has_stages(self) -> bool: ...
    def gather_words(self, words: array[int], bounds: Sequence[int]) -> None: ...
    def receive_ids(self, ids: array[int], count: int) -> None: ...
    def send_ids(self, ids: array[int], count: int) -> None: ...
    def take_waited_ns(self) -> int: ...


class Runner(Protocol):
    """A loaded model, or a rank's part of it, with its KV region and tiers."""

    kernels: CpuKernels
    dtype: str
    place: RankPlace
    limits: EngineLimits
    """With the KV blocks that there are."""
    layers: int
    weight_bytes: int
    """Of this rank's weights as it keeps them."""
    numerics: str
    """What tokens depend on beside request and weights."""
    host: HostTier | None

    @property
    def max_steps_ahead(self) -> int:
        """How many steps it can have begun beside the one that is answered next."""

    @property
    def exchange(self) -> Exchange | None:
        """None for one rank."""

    def steps(self, source: StepSource) -> Steps:
        """The steps of whoever owns a mirror."""

    def rest(self) -> None:
        """To be called when there is no step to compute."""

    def copy(self, counts: StepCounts, source: CopySource) -> bool:
        """Makes the step's copies between tiers, before its rows are computed. False: the step was given up."""


@dataclass(frozen=True, slots=True)
class RunnerOptions:
    """What a runner is made of beside a model and limits."""

    dtype: str
    quantization: str | None = None
    kv_dtype: str = "auto"
    threads: int | None = None
    place: RankPlace = field(default_factory=RankPlace)
    meeting: Meeting = field(default_factory=Meeting)
    host_memory: str | None = None
    disk: DiskPlace | None = None
    device: str = "cpu"
    device_index: int = 0


def make_runner(
    executor: str, folder: Path, limits: EngineLimits, options: RunnerOptions, progress: Progress | None = None
) -> Runner:
    """Loads a model for an executor, "native" or "torch". Raises ModelError, ConfigError, WorkerError, MemoryError."""
    if executor == "native":
        from llmscale.worker.native_runner import NativeRunner

        return NativeRunner(folder, limits, options, progress)
    from llmscale.worker.model_runner import ModelRunner

    return ModelRunner(folder, limits, options, progress)


def open_tiers(
    region: BlockMemory,
    limits: EngineLimits,
    numerics: str,
    options: RunnerOptions,
    accelerator: Accelerator | None = None,
) -> HostTier | None:
    """The host tier of a runner with this region, and the disk tier below it, as far as limits have them. A region that
    is not the processor's is copied by its accelerator. Raises ConfigError, WorkerError."""
    if limits.disk_blocks > 0 and options.disk is None:
        raise ConfigError("the replica has a disk tier and this host has no folder for it; give every host kv_disk")
    if limits.host_blocks == 0:
        return None
    disk = None if options.disk is None else (options.disk, limits.disk_blocks)
    return HostTier(region, limits.host_blocks, numerics, options.place, options.host_memory, accelerator, disk)


def make_copies(host: HostTier | None, counts: StepCounts, source: CopySource) -> bool:
    """The copies of a step, for a runner with this host tier."""
    if counts.copies == 0 and counts.transfers == 0:
        return True
    assert host is not None, "copies are planned only where there is a host tier"
    return host.copy(source, has_transfers=counts.transfers > 0)
