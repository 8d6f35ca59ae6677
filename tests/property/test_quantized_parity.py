"""A quantized model computes what transformers computes with the same weights dense in float32.

Method: checkpoints of every kind of arithmetic, whole and among ranks, in random batches and chunks; logits of every
position against the oracle whose weights are the floats that codes and scales mean. Activations are float32; int4
rounds them to bfloat16 and int8 to bytes, which sets the bounds.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from llmscale._core import CpuKernels
from llmscale.errors import ConfigError, UnsupportedModel
from llmscale.layers.native import NativeOps
from llmscale.models.loader import LoadOptions, load_weights
from llmscale.models.quantizer import layout_for, quantize_folder
from llmscale.models.registry import describe_model
from llmscale.worker.executor_torch import TorchExecutor
from llmscale.worker.kv_region import KvRegion, kv_layout
from llmscale.worker.step import StepLimits
from tests.fakes.rank_threads import RankThreads
from tests.models_support import NativeExecutor, RandomPlanner, write_tiny_model
from tests.quantized_checkpoints import write_dense_model, write_quantized_model

LIMITS = StepLimits(max_step_tokens=48, max_sequences=48, max_sequence_tokens=128)
BLOCKS = 12
PROMPTS = [[random.Random(seed).randrange(61) for _ in range(tokens)] for seed, tokens in ((1, 1), (2, 9), (3, 40))]
# Root mean square of the difference over that of the logits, by kind. int4 is as near as
# bfloat16: measured 0.003 to 0.017, the most with zero points that are drawn evenly, as no trained weights have them.
BOUNDS = {"fp8": 1e-5, "int4": 0.03, "int8": 0.04}
CASES = {
    "compressed_int4_with_zero_points": "int4",
    "compressed_int4_ordered": "int4",
    "awq": "int4",
    "gptq": "int4",
    "gptq_act_order": "int4",
    "compressed_int8": "int8",
    "fp8_blocks": "fp8",
    "compressed_fp8_channel": "fp8",
}

NATIVE = (
    "compressed_int4_with_zero_points",
    "compressed_int4_symmetric",
    "compressed_int8",
    "awq",
    "gptq",
    "gptq_v2",
    "gptq_one_group",
    "fp8_blocks",
    "fp8_tensor",
    "compressed_fp8_channel",
)

pytestmark = pytest.mark.usefixtures("one_thread")


def oracle(folder: Path, dense: dict[str, Tensor], **changes: object) -> Any:
    write_dense_model(folder, dense, **changes)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")


def computed(planner: RandomPlanner) -> list[Tensor]:
    sequences = [planner.admit(prompt) for prompt in PROMPTS]
    planner.run_until_computed(sequences)
    return [torch.stack(sequence.logits) for sequence in sequences]


def alone(folder: Path) -> RandomPlanner:
    model = describe_model(folder)
    weights = load_weights(model.folder, model.spec, LoadOptions(dtype="float32"))
    region = KvRegion(kv_layout(model.spec, weights.dtype), BLOCKS)
    ops = NativeOps(CpuKernels("float32", threads=1))
    return RandomPlanner(TorchExecutor(model.spec, weights, region, ops, LIMITS), region, LIMITS, seed=1)


def assert_near(logits: list[Tensor], model: Any, bound: float) -> None:
    for prompt, ours in zip(PROMPTS, logits, strict=True):
        with torch.inference_mode():
            theirs = model(torch.tensor([prompt])).logits[0]
        error = float((ours - theirs).square().mean().sqrt() / theirs.square().mean().sqrt())
        assert error <= bound, f"{len(prompt)} tokens: {error:.2e}"


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_the_weights_that_are_meant(name: str, tmp_path: Path) -> None:
    dense = write_quantized_model(tmp_path / "quantized", name, num_hidden_layers=2)
    model = oracle(tmp_path / "dense", dense, num_hidden_layers=2)
    assert_near(computed(alone(tmp_path / "quantized")), model, BOUNDS[CASES[name]])


@pytest.mark.parametrize("name", NATIVE)
def test_the_native_executor_computes_the_weights_that_are_meant(name: str, tmp_path: Path) -> None:
    """Rows are rounded to bytes for integer codes, which sets the bound; e4m3 becomes dense."""
    dense = write_quantized_model(tmp_path / "quantized", name, num_hidden_layers=2)
    model = oracle(tmp_path / "dense", dense, num_hidden_layers=2)
    executor = NativeExecutor(tmp_path / "quantized", "float32", LIMITS, BLOCKS)
    bound = BOUNDS["fp8" if "fp8" in name else "int8"]
    assert_near(computed(RandomPlanner(executor, executor.region, LIMITS, seed=1)), model, bound)


def test_the_native_executor_has_the_same_bits_of_formats_with_the_same_codes(tmp_path: Path) -> None:
    """They are drawn in one order, and no number is stored otherwise."""
    logits = []
    for name in ("awq", "gptq", "gptq_v2"):
        write_quantized_model(tmp_path / name, name, num_hidden_layers=2)
        executor = NativeExecutor(tmp_path / name, "float32", LIMITS, BLOCKS)
        logits.append(computed(RandomPlanner(executor, executor.region, LIMITS, seed=1)))
    for one, *others in zip(*logits, strict=True):
        assert all(torch.equal(one, other) for other in others)


def test_the_native_executor_refuses_what_only_torch_reads(tmp_path: Path) -> None:
    for name in ("compressed_int4_ordered", "gptq_act_order"):
        write_quantized_model(tmp_path / name, name, num_hidden_layers=1)
        with pytest.raises(ConfigError, match="use --executor torch"):
            NativeExecutor(tmp_path / name, "float32", LIMITS, BLOCKS)


def test_a_bias_that_an_architecture_does_not_have_is_refused_unless_it_is_zero(tmp_path: Path) -> None:
    write_quantized_model(tmp_path, "gptq", num_hidden_layers=1)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("o_proj.bias"))
    tensors[name] = -tensors[name]
    save_file(tensors, path)
    NativeExecutor(tmp_path, "float32", LIMITS, BLOCKS)
    tensors[name][3] = 0.5
    save_file(tensors, path)
    with pytest.raises(UnsupportedModel, match=r"o_proj\.bias' is not zero, but this architecture has no bias there"):
        NativeExecutor(tmp_path, "float32", LIMITS, BLOCKS)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("compressed_int4_symmetric", "int4"), ("awq", "int4"), ("compressed_int8", "int8"), ("fp8_blocks", "fp8")],
)
def test_ranks_and_stages_compute_a_quantized_model_together(name: str, kind: str, tmp_path: Path) -> None:
    """Two ranks cut groups of 64 into 32 at the heads; biases are there once."""
    changes: dict[str, object] = {"num_hidden_layers": 2, "attention_bias": True}
    dense = write_quantized_model(tmp_path / "quantized", name, **changes)
    model = oracle(tmp_path / "dense", dense, **changes)
    for tensor_size, stages in ((2, 1), (2, 2)):
        with RankThreads(tmp_path / "quantized", tensor_size, stages, "float32", BLOCKS, LIMITS) as ranks:
            assert_near(computed(RandomPlanner(ranks, ranks.region, LIMITS, seed=1)), model, BOUNDS[kind])


def test_a_checkpoint_that_we_quantize_is_what_it_rounds(tmp_path: Path) -> None:
    """Every architecture goes one way; the loss of FP8 on random weights is that of three bits."""
    source = tmp_path / "source"
    model = write_tiny_model("qwen2", source)
    quantize_folder(source, tmp_path / "quantized", layout_for("fp8"))
    assert_near(computed(alone(tmp_path / "quantized")), model, 0.12)
