"""Whole decode steps on a device, without a server: an 8B-shaped and a small random model, in bfloat16 and in 4 bits.

A step is what a worker runs: ids handed on from the step before, all layers, head and sampler, replayed as a graph and
run eagerly. Every sequence has 1,024 tokens in scattered blocks. A step has to read each weight and each key and value
once, so its time stands against these bytes at the measured copy rate; within 1.35 times of that is the aim. Costs the
model's memory and the KV of the largest batch; batches that have no room are left out. It knows nothing of requests.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bench.gpu_timing import Budget
from bench.result import Row
from bench.shapes import SHAPES, config_of
from bench.statistics import Spread, spread
from llmscale._core import CpuKernels
from llmscale.devices.interface import Accelerator, Device, OpsNeeds, Work
from llmscale.devices.registry import open_device
from llmscale.models.config import ConfigFields
from llmscale.models.llama import spec as llama_spec
from llmscale.models.loader import Weights
from llmscale.models.quantization import requested_quantization
from llmscale.models.spec import LinearSpec, ModelSpec
from llmscale.parallel.tensor import Alone
from llmscale.quant.weight import QuantizedWeight
from llmscale.worker.device_steps import DeviceStepper
from llmscale.worker.executor_torch import TorchExecutor
from llmscale.worker.kv_region import KvRegion, kv_layout
from llmscale.worker.step import StepLimits
from llmscale.worker.step_memory import DeviceStep, StepMemory

DEVICE_NAME = "cuda"
"""Tests name another one."""
MODELS = ("8B", "S")
FORMATS: tuple[str | None, ...] = ("int4-128", None)
"""As `--quantization` has them; None is bfloat16."""
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
CONTEXT_TOKENS = 1_024
BLOCK_TOKENS = 32
GROUP = 128
AIM = 1.35
"""Times of what the bytes take at the copy rate."""
WARM_STEPS = 3
STEPS = 10
REPEATS = 5
SPARE_BYTES = 4 << 30
"""Not for KV: graphs, activations, fragments."""


@dataclass(frozen=True, slots=True)
class Model:
    """Ready to step, and the bytes that each step reads of it."""

    accelerator: Accelerator
    stepper: DeviceStepper
    memory: StepMemory
    blocks: int
    weight_bytes: int
    token_bytes: int
    """Keys and values of a token in all layers."""

    def step_bytes(self, batch: int) -> int:
        """That a step has to move: weights and context read, its own keys and values written."""
        return self.weight_bytes + batch * (CONTEXT_TOKENS + 1) * self.token_bytes


def step_rates(budget: Budget, limits: dict[str, float]) -> Iterator[Row]:
    """Of every model, format and batch."""
    for name in MODELS:
        for quantization in FORMATS:
            if not budget.allows():
                continue
            model = make_model(name, quantization)
            accelerator = model.accelerator
            yield from _of_model(f"steps/{name}/{quantization or 'bf16'}", model, budget, limits)
            # A graph holds on to memory, and the next model needs all of it.
            del model
            gc.collect()
            accelerator.empty_cache()


def make_model(name: str, quantization: str | None) -> Model:
    """A random model with KV for the largest batch that there is room for, with everything that a worker has."""
    device = open_device(DEVICE_NAME)
    accelerator = device.accelerator
    assert accelerator is not None, "whole steps are those of a device apart"
    spec = llama_spec(ConfigFields(config_of(SHAPES[name]), "the shapes of this benchmark"))
    spec = replace(spec, quantization=requested_quantization(quantization, None))
    limits = StepLimits(max(BATCHES), max(BATCHES), CONTEXT_TOKENS + BLOCK_TOKENS)
    attention = spec.blocks[0].attention
    kernels = CpuKernels("bfloat16", threads=1)
    ops = device.ops(OpsNeeds(attention, torch.bfloat16, limits.max_sequences, limits.max_sequence_tokens, kernels))
    layout = kv_layout(spec, torch.bfloat16, BLOCK_TOKENS)
    executor = TorchExecutor(
        spec, _random_weights(spec, device), KvRegion(layout, 1, device.torch_device), ops, limits, device=device
    )
    sampler = accelerator.sampler(executor.logits_width, limits.max_sequences)
    memory = StepMemory(accelerator, device.torch_device, limits, BLOCK_TOKENS)
    stepper = DeviceStepper(accelerator, executor, memory, limits, sampler, Alone(), is_alone=True)
    room = max(1, (accelerator.memory().free_bytes - SPARE_BYTES) // layout.block_bytes)
    region = KvRegion(layout, min(room, max(BATCHES) * _blocks_each()), device.torch_device)
    # A device runs faster on zeros.
    region.tensor.normal_()
    executor.use_region(region)
    # What was made so far was made on another stream than steps run on.
    accelerator.empty_cache()
    token_bytes = layout.block_bytes // BLOCK_TOKENS
    return Model(accelerator, stepper, memory, region.blocks, weight_bytes(spec), token_bytes)


def weight_bytes(spec: ModelSpec) -> int:
    """That a step reads: all but the embedding, of which it reads a row per sequence, unless it is the head too."""
    quantized = {linear.weight.name for linear in spec.linears()} if spec.quantization is not None else set()
    total = 0
    for weight in spec.weights():
        if weight is spec.embedding and not spec.head.tied:
            continue
        if weight.name in quantized:
            total += weight.elements // 2 + 2 * weight.elements // GROUP
        else:
            total += 2 * weight.elements
    return total


def _blocks_each() -> int:
    return -(-(CONTEXT_TOKENS + 1) // BLOCK_TOKENS)


def _random_weights(spec: ModelSpec, device: Device) -> Weights:
    """Scaled like a trained model's, so that activations neither vanish nor overflow."""
    there = device.torch_device
    linears: dict[str, LinearSpec] = {linear.weight.name: linear for linear in spec.linears()}
    tensors: dict[str, Tensor] = {}
    quantized: dict[str, QuantizedWeight] = {}
    for weight in spec.weights():
        if spec.quantization is None or weight.name not in linears:
            ones = len(weight.shape) == 1
            values = torch.ones if ones else torch.randn
            tensors[weight.name] = values(weight.shape, dtype=torch.bfloat16, device=there).mul_(1.0 if ones else 0.02)
            continue
        outputs, inputs = weight.shape
        quantized[weight.name] = QuantizedWeight(
            codes=torch.randint(0, 256, (outputs, inputs // 2), dtype=torch.uint8, device=there),
            scales=torch.rand(outputs, -(-inputs // GROUP), device=there) * 0.008,
            group_size=GROUP,
        )
    return Weights(tensors, torch.bfloat16, "random", quantized)


def _of_model(case: str, model: Model, budget: Budget, limits: dict[str, float]) -> Iterator[Row]:
    accelerator, stepper = model.accelerator, model.stepper
    # The largest first, so that graphs of the others fit the memory that its own has taken.
    for batch in reversed(BATCHES):
        if batch * _blocks_each() > model.blocks:
            budget.left_out += 1
            continue
        if not budget.allows():
            continue
        step = decode_step(model, batch)

        def work(step: DeviceStep = step) -> None:
            stepper.forward(step)

        eager = milliseconds(accelerator, work)
        yield _row(f"{case}/{batch}/eager", model, batch, eager, limits)
        if accelerator.max_graphs > 0:
            graph = accelerator.capture(work)
            yield _row(f"{case}/{batch}/graph", model, batch, milliseconds(accelerator, graph), limits)


def decode_step(model: Model, batch: int) -> DeviceStep:
    """One row each for sequences of equal length; their blocks lie scattered over the region."""
    step = model.memory.step((batch, batch), batch, (0, batch))
    inputs, sampling = step.inputs, step.sampling
    blocks = _blocks_each()
    tables = torch.randperm(model.blocks, dtype=torch.int32)[: batch * blocks].view(batch, blocks)
    order = torch.arange(batch, dtype=torch.int32)
    last = tables[:, CONTEXT_TOKENS // BLOCK_TOKENS]

    def fill() -> None:
        inputs.token_ids.copy_(order)
        inputs.positions.fill_(CONTEXT_TOKENS)
        inputs.slot_mapping.copy_(last * BLOCK_TOKENS + CONTEXT_TOKENS % BLOCK_TOKENS)
        inputs.query_start.copy_(torch.arange(batch + 1, dtype=torch.int32))
        inputs.sequence_lengths.fill_(CONTEXT_TOKENS + 1)
        inputs.table_offsets.copy_(order * blocks)
        inputs.block_tables[: tables.numel()].copy_(tables.flatten())
        inputs.sample_rows.copy_(order)
        # As in a server: each id is what the step before has sampled for its row.
        step.drawn_from.copy_(order + 1)
        for column, value in (
            (sampling.temperature, 0.8),
            (sampling.top_p, 0.95),
            (sampling.min_p, 0.0),
            (sampling.repetition_penalty, 1.0),
            (sampling.presence_penalty, 0.0),
            (sampling.frequency_penalty, 0.0),
            (sampling.top_k, 50),
            (sampling.choice, 0),
            (sampling.position, CONTEXT_TOKENS + 1),
            (sampling.top_logprobs, 0),
            (sampling.seed_high, 0),
            (sampling.change_start, 0),
        ):
            column.fill_(value)
        sampling.seed_low.copy_(order)
        drawn = model.stepper.sampler
        assert drawn is not None, "it was made with the model"
        # Nothing was sampled before the first step.
        drawn.drawn.zero_()

    stream = model.accelerator.compute
    stream.run(fill)
    stream.record().wait()
    return step


def milliseconds(accelerator: Accelerator, work: Work) -> Spread:
    """Of one of several steps that follow each other, by the device's clock."""
    stream = accelerator.compute
    for _ in range(WARM_STEPS):
        stream.run(work)
    stream.record().wait()
    times = []
    for _ in range(REPEATS):
        before = stream.record()
        for _ in range(STEPS):
            stream.run(work)
        after = stream.record()
        after.wait()
        times.append(after.elapsed_ns_since(before) / STEPS / 1e6)
    return spread(times)


def _row(case: str, model: Model, batch: int, measured: Spread, limits: dict[str, float]) -> Row:
    moved = model.step_bytes(batch)
    peers: dict[str, float | str] = {
        "gigabytes": moved / 1e9,
        "GB/s": moved / measured.median / 1e6,
        "tokens/s": batch / measured.median * 1e3,
    }
    share: float | None = None
    if (limit := limits.get("copy_gigabytes_per_second")) is not None:
        share = moved / measured.median / 1e6 / limit
        peers["times its bytes at the copy rate"] = 1 / share
        peers["the aim"] = AIM
    return Row(case, measured.median, "ms", measured.low, measured.high, measured.repeats, share, peers)
