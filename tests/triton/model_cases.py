"""A whole model through the executor on Triton kernels: greedy ids of the reference, in random batches and chunks."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from llmscale._core import CpuKernels
from llmscale.layers.native import NativeOps
from llmscale.layers.ops import Ops
from llmscale.layers.reference import ReferenceOps
from llmscale.layers.triton.ops import OpsLimits, TritonOps
from llmscale.layers.triton.tiling import DeviceShape
from llmscale.models.loader import LoadOptions, load_weights
from llmscale.models.registry import describe_model
from llmscale.worker.executor_torch import TorchExecutor
from llmscale.worker.kv_region import KvRegion, kv_layout
from llmscale.worker.step import StepInputs, StepLimits
from tests.models_support import RandomPlanner, write_random_checkpoint
from tests.triton.outcome import Case, require_close

LIMITS = StepLimits(max_step_tokens=64, max_sequences=64, max_sequence_tokens=96)
NEW_TOKENS = 3


class OnDevice:
    """An executor whose steps are moved to its device, and its logits back, for a planner on the CPU."""

    def __init__(self, executor: TorchExecutor, device: torch.device) -> None:
        self._executor = executor
        self._device = device

    def forward(self, step: StepInputs) -> Tensor:
        names = ("token_ids", "positions", "slot_mapping", "query_start", "sequence_lengths", "table_offsets")
        moved = {name: getattr(step, name).to(self._device) for name in (*names, "block_tables", "sample_rows")}
        counts = {"rows": step.rows, "sequences": step.sequences, "samples": step.samples}
        return self._executor.forward(StepInputs(**counts, **moved)).cpu()


def decoded(folder: Path, device: torch.device, make_ops: Callable[[], Ops]) -> tuple[list[list[int]], Tensor]:
    """Ids of three sequences, and the logits of all their positions."""
    description = describe_model(folder)
    weights = load_weights(description.folder, description.spec, LoadOptions(dtype="float32", device=device))
    region = KvRegion(kv_layout(description.spec, weights.dtype, 16), 40, device)
    executor = TorchExecutor(description.spec, weights, region, make_ops(), LIMITS)
    planner = RandomPlanner(OnDevice(executor, device), region, LIMITS, seed=3)
    prompts = [[7, 1, 2], [11] * 17 + [5], [token % 53 for token in range(3, 60, 2)]]
    sequences = [planner.admit(prompt) for prompt in prompts]
    planner.decode_greedily(sequences, NEW_TOKENS)
    return [sequence.tokens for sequence in sequences], torch.cat([torch.stack(each.logits) for each in sequences])


def whole_model_case(device: torch.device) -> None:
    """Three executors plan and compute the same steps."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_random_checkpoint(folder)
        spec = describe_model(folder).spec.blocks[0].attention
        limits = OpsLimits(LIMITS.max_sequences, LIMITS.max_sequence_tokens)
        shape = DeviceShape(8, 99 * 1024)
        ids, logits = decoded(folder, device, lambda: TritonOps(spec, torch.float32, limits, device, shape))
        cpu = torch.device("cpu")
        reference_ids, reference_logits = decoded(folder, cpu, ReferenceOps)
        native_ids, _ = decoded(folder, cpu, lambda: NativeOps(CpuKernels("float32", threads=1)))
    assert ids == reference_ids, (ids, reference_ids)
    assert ids == native_ids, (ids, native_ids)
    # Random weights of spread 1 make logits of about 1,000.
    require_close("logits", logits, reference_logits, 1e-3)


CASES: dict[str, Case] = {"model_has_the_ids_of_reference_and_native_kernels": whole_model_case}
