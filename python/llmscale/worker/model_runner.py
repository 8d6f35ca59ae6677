"""What a worker runs: a model's executor on a device, with its KV region, its host tier and what its steps need there.

Built once per process. Nothing runs per token or per sequence in Python. It does not know where steps come from or who
samples.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from llmscale import env
from llmscale._core import CpuKernels, EngineLimits, StepCounts
from llmscale.devices.interface import OpsNeeds
from llmscale.devices.registry import open_device
from llmscale.errors import ConfigError
from llmscale.models.checkpoint import Progress, compute_dtype, open_checkpoint
from llmscale.models.loader import LoadOptions, load_weights
from llmscale.models.registry import describe_model
from llmscale.models.shard import shard_model
from llmscale.models.spec import ModelSpec
from llmscale.parallel.groups import join_stages, join_tensor_group, join_world
from llmscale.parallel.interface import interface_towards
from llmscale.worker.device_start import DeviceStart
from llmscale.worker.device_steps import DeviceStepper, DeviceSteps
from llmscale.worker.executor_torch import Ranks, TorchExecutor
from llmscale.worker.host_steps import HostSteps
from llmscale.worker.host_tier import CopySource
from llmscale.worker.kv_region import KvRegion, kv_layout
from llmscale.worker.runner import RunnerOptions, make_copies, open_tiers
from llmscale.worker.sample_exchange import SampleExchange
from llmscale.worker.step import StepInputs, StepLimits
from llmscale.worker.steps import Steps, StepSource


class ModelRunner:
    """A loaded model, or a rank's part of it, on a device of this process."""

    def __init__(
        self, folder: Path, limits: EngineLimits, options: RunnerOptions, progress: Progress | None = None
    ) -> None:
        """Meets the other ranks, loads weights, makes the KV region. Raises ModelError, ConfigError, WorkerError.

        A device apart may have room for fewer KV blocks than `limits` allow: `limits` of the runner say how many it is.
        """
        if options.kv_dtype != "auto":
            raise ConfigError(
                f"kv_dtype is {options.kv_dtype!r}, and the torch executor keeps keys and values as the activations"
                " are; leave it at auto, or use --executor native"
            )
        self.device = open_device(options.device, options.device_index)
        self.place = place = options.place
        meeting = options.meeting
        if meeting.rendezvous is not None:
            env.prepare_for_torch_distributed(interface_towards(meeting.rendezvous))
        world = join_world(place, meeting, env.GLOO_INTERFACE.read() or "lo", self.device.torch_device.type)
        description = describe_model(folder, options.quantization)
        part = shard_model(description.spec, place)
        checkpoint, where = open_checkpoint(description.folder), self.device.torch_device
        self.dtype = compute_dtype(options.dtype, description.spec, checkpoint, where.type)
        # Before weights are read, as above: whoever reads them for longer than that is still there.
        self.stage = join_stages(place, meeting, world)
        self.tensor = join_tensor_group(place, meeting, self.dtype, world)
        self.exchange = None if place.ranks == 1 else SampleExchange(self.tensor, self.stage)
        load = LoadOptions(dtype=self.dtype, device=where, progress=progress)
        weights = load_weights(description.folder, description.spec, load, part)
        self.kernels = CpuKernels(self.dtype, threads=options.threads, level=env.CPU_LEVEL.read())
        torch.set_num_threads(self.kernels.threads)
        layout = kv_layout(part.spec, weights.dtype, limits.block_tokens)
        step_limits = StepLimits(
            max_step_tokens=limits.max_step_tokens,
            max_sequences=limits.max_sequences,
            max_sequence_tokens=limits.max_sequence_tokens,
        )
        ranks = Ranks(self.tensor, self.stage, part.vocabulary_start, part.vocabulary_widths)
        ops = self.device.ops(_ops_needs(part.spec, weights.dtype, step_limits, self.kernels))

        def executor(region: KvRegion) -> TorchExecutor:
            return TorchExecutor(part.spec, weights, region, ops, step_limits, ranks, self.device)

        self._stepper: DeviceStepper | None = None
        accelerator = self.device.accelerator
        if accelerator is None:
            self.region = KvRegion(layout, limits.total_blocks)
            self._executor = executor(self.region)
        else:
            start = DeviceStart(accelerator, self.device.torch_device, step_limits, layout)
            begun = start.begin(executor, limits.total_blocks, ranks, world)
            self.region, self._executor, self._stepper = begun
        self.limits = limits.with_total_blocks(self.region.blocks)
        self._logits: Tensor | None = None
        self.weight_bytes = weights.total_bytes
        self.layers = len(part.spec.blocks)
        sums = f"{self.tensor.kind}{place.tensor_size}"
        kernels = self.device.numerics(self.kernels)
        self.numerics = f"torch-{torch.__version__}/{self._executor.linear_kind}/{kernels}/{self.dtype}/{sums}"
        self.host = open_tiers(self.region, limits, self.numerics, options, accelerator)

    @property
    def max_steps_ahead(self) -> int:
        """How many steps may be begun before the first of them is answered, but for one. Ranks of one replica tell each
        other what they drew, stages send it: by way of the processor, when a step is done."""
        return 0 if self._stepper is None or self.place.ranks > 1 else 1

    def steps(self, source: StepSource) -> Steps:
        """The steps of whoever owns a mirror."""
        if self._stepper is None:
            return HostSteps(self, source)
        return DeviceSteps(self._stepper, source, self.kernels, self.dtype, self.max_steps_ahead)

    def rest(self) -> None:
        """To be called when there is no step to compute."""
        if self.host is not None:
            self.host.rest()

    def copy(self, counts: StepCounts, source: CopySource) -> bool:
        """Makes the step's copies between tiers, before its rows are computed. False: the step was given up."""
        return make_copies(self.host, counts, source)

    def forward(self, step: StepInputs) -> tuple[int, int]:
        """Runs one step. Returns address and number of elements of the logits, valid until the next call.

        A step without rows, which only copies blocks, has no logits.
        """
        if step.rows == 0:
            return self.region.tensor.data_ptr(), 0
        # Held until the next step: the sampler reads it by address.
        self._logits = self._executor.forward(step)
        return self._logits.data_ptr(), self._logits.numel()


def _ops_needs(spec: ModelSpec, dtype: torch.dtype, limits: StepLimits, kernels: CpuKernels) -> OpsNeeds:
    return OpsNeeds(
        attention=spec.blocks[0].attention,
        dtype=dtype,
        max_sequences=limits.max_sequences,
        max_sequence_tokens=limits.max_sequence_tokens,
        kernels=kernels,
    )


def warm_up() -> None:
    """Makes oneDNN set itself up, which takes 30 ms that need not be part of anybody's pause. Starts no thread."""
    torch.set_num_threads(1)
    for dtype in (torch.float32, torch.bfloat16):
        torch.ones(2, 32, dtype=dtype) @ torch.ones(32, 32, dtype=dtype)
