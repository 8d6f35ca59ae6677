"""What computes the steps of an evaluation: the native program or torch's layers, chosen as a node chooses.

Both take a step's index arrays and give the logits of the rows that are asked for. Memory is the model's and a KV
region for one step and the longest sequence. It does not know sequences or what logits are used for.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from llmscale import env
from llmscale._core import CpuKernels, EngineLimits
from llmscale.config import check_threads
from llmscale.devices.cpu import CpuDevice
from llmscale.devices.interface import OpsNeeds
from llmscale.models.checkpoint import open_checkpoint
from llmscale.models.loader import LoadOptions, load_weights
from llmscale.models.native import native_refusal
from llmscale.models.registry import ModelDescription, describe_model
from llmscale.node.plan import check_kv_dtype, choose_executor
from llmscale.worker.executor_torch import TorchExecutor
from llmscale.worker.kv_layout import DEFAULT_BLOCK_TOKENS
from llmscale.worker.kv_region import KvRegion, kv_layout
from llmscale.worker.native_runner import NativeRunner
from llmscale.worker.runner import RunnerOptions
from llmscale.worker.step import StepInputs, StepLimits


@dataclass(frozen=True, slots=True)
class ModelChoice:
    """A model folder and how to hold it; `executor` is "native", "torch" or "auto" as for `LLM`. Raises ConfigError."""

    folder: Path
    dtype: str = "auto"
    quantization: str | None = None
    threads: int | None = None
    executor: str = "auto"
    kv_dtype: str = "auto"

    def __post_init__(self) -> None:
        check_threads(self.threads)


class ScoringExecutor(Protocol):
    """A model whose steps can be computed."""

    @property
    def weight_bytes(self) -> int:
        """Of the weights as they are computed with."""

    def forward(self, step: StepInputs) -> Tensor:
        """Logits `[samples, vocabulary]`, valid until the next call."""


def scoring_executor(choice: ModelChoice, limits: StepLimits, blocks: int) -> ScoringExecutor:
    """Loads a model, with room for so many KV blocks. Raises ModelError, ConfigError and MemoryError."""
    model = describe_model(choice.folder, choice.quantization)
    refusal = native_refusal(model.spec, open_checkpoint(model.folder))
    executor, _ = choose_executor(choice.executor, "cpu", 1, refusal)
    check_kv_dtype(choice.kv_dtype, executor, "cpu")
    if executor == "native":
        return NativeExecutor(choice, model, limits, blocks)
    return _Torch(choice, model, limits, blocks)


class NativeExecutor:
    """The native program of a model: index arrays go in, logits come out as a tensor of their own."""

    def __init__(self, choice: ModelChoice, model: ModelDescription, limits: StepLimits, blocks: int) -> None:
        self.logits_width = model.spec.vocabulary
        engine_limits = EngineLimits(
            vocabulary=self.logits_width,
            total_blocks=blocks,
            block_tokens=DEFAULT_BLOCK_TOKENS,
            max_sequence_tokens=limits.max_sequence_tokens,
            max_sequences=limits.max_sequences,
            max_step_tokens=limits.max_step_tokens,
            eos_tokens=[],
        )
        options = RunnerOptions(
            dtype=choice.dtype, quantization=choice.quantization, kv_dtype=choice.kv_dtype, threads=choice.threads
        )
        self.runner = NativeRunner(choice.folder, engine_limits, options)
        self.logits_dtype: torch.dtype = getattr(torch, self.runner.dtype)

    @property
    def weight_bytes(self) -> int:
        """See `ScoringExecutor`."""
        return self.runner.weight_bytes

    def forward(self, step: StepInputs) -> Tensor:
        """See `ScoringExecutor`."""
        columns = (
            step.token_ids,
            step.positions,
            step.slot_mapping,
            step.query_start,
            step.sequence_lengths,
            step.table_offsets,
            step.block_tables,
            step.sample_rows,
        )
        program = self.runner.program
        program.forward(self.runner.kernels, [(column.data_ptr(), column.numel()) for column in columns])
        address, elements = program.logits
        logits = torch.empty(step.samples, self.logits_width, dtype=self.logits_dtype)
        assert elements == logits.numel(), (elements, logits.shape)
        ctypes.memmove(logits.data_ptr(), address, logits.nbytes)
        return logits


class _Torch:
    def __init__(self, choice: ModelChoice, model: ModelDescription, limits: StepLimits, blocks: int) -> None:
        spec = model.spec
        weights = load_weights(model.folder, spec, LoadOptions(dtype=choice.dtype))
        self.weight_bytes = weights.total_bytes
        dtype = "bfloat16" if weights.dtype is torch.bfloat16 else "float32"
        kernels = CpuKernels(dtype, threads=choice.threads, level=env.CPU_LEVEL.read())
        torch.set_num_threads(kernels.threads)
        region = KvRegion(kv_layout(spec, weights.dtype), blocks)
        device = CpuDevice()
        attention = spec.blocks[0].attention
        needs = OpsNeeds(attention, weights.dtype, limits.max_sequences, limits.max_sequence_tokens, kernels)
        self._executor = TorchExecutor(spec, weights, region, device.ops(needs), limits, device=device)

    def forward(self, step: StepInputs) -> Tensor:
        return self._executor.forward(step)
