"""Random tiny checkpoints of every architecture against transformers, alone and in random batches and chunks.

Goal: an executor computes exactly the model that the checkpoint's authors mean, however the engine cuts and mixes the
work. Method: the same weights in transformers (eager attention, float32) and in `TorchExecutor`; logits of every
position are compared, then 200 greedy tokens. The native executor and torch with native operations run every test,
torch's own operations nearly every one.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from llmscale._core import CpuKernels
from llmscale.embedded import EMBEDDED_MODELS, embedded_model_path
from llmscale.layers.native import NativeOps
from llmscale.layers.ops import Ops
from llmscale.layers.reference import ReferenceOps
from llmscale.models.loader import LoadOptions, load_weights
from llmscale.models.registry import describe_model
from llmscale.worker.executor_torch import TorchExecutor
from llmscale.worker.kv_layout import BlockMemory
from llmscale.worker.kv_region import KvRegion, kv_layout
from llmscale.worker.step import Executor, StepInputs, StepLimits
from tests.models_support import TINY_CONFIGS, VOCABULARY, NativeExecutor, RandomPlanner, write_tiny_model

MAX_RELATIVE_ERROR = 1e-4
"""Of the largest logit of the position; float32 sums of 100 terms in another order differ by about 1e-6."""
NEAR_TIE = 1e-4
MAX_BFLOAT16_ERROR = 0.05
"""Root mean square over that of the logits. Measured 0.017 to 0.038; transformers in bfloat16 has 0.034 to 0.075."""
LIMITS = StepLimits(max_step_tokens=96, max_sequences=96, max_sequence_tokens=320)

pytestmark = pytest.mark.usefixtures("one_thread")


BLOCKS = 48

MakeExecutor = Callable[[Path, str], tuple[Executor, BlockMemory]]
"""Of a model folder and a dtype, with its KV region."""


def torch_executor(folder: Path, dtype: str, ops: Ops) -> tuple[Executor, BlockMemory]:
    model = describe_model(folder)
    weights = load_weights(model.folder, model.spec, LoadOptions(dtype=dtype))
    region = KvRegion(kv_layout(model.spec, weights.dtype), BLOCKS)
    return TorchExecutor(model.spec, weights, region, ops, LIMITS), region


def native_executor(folder: Path, dtype: str) -> tuple[Executor, BlockMemory]:
    executor = NativeExecutor(folder, dtype, LIMITS, BLOCKS)
    return executor, executor.region


EXECUTORS: dict[str, MakeExecutor] = {
    "reference": lambda folder, dtype: torch_executor(folder, dtype, ReferenceOps()),
    "torch": lambda folder, dtype: torch_executor(folder, dtype, NativeOps(CpuKernels(dtype, threads=2))),
    "native": native_executor,
}


@pytest.fixture(params=EXECUTORS)
def make(request: pytest.FixtureRequest) -> MakeExecutor:
    """torch with its own operations and with the native ones, and the native executor."""
    return EXECUTORS[request.param]


def planner_for(folder: Path, seed: int, make: MakeExecutor, dtype: str = "float32") -> RandomPlanner:
    executor, region = make(folder, dtype)
    return RandomPlanner(executor, region, LIMITS, seed)


def random_prompt(source: random.Random, tokens: int) -> list[int]:
    return [source.randrange(VOCABULARY) for _ in range(tokens)]


def oracle_logits(model: Any, tokens: list[int]) -> Tensor:
    with torch.inference_mode():
        logits: Tensor = model(torch.tensor([tokens])).logits[0]
    return logits


def assert_close(ours: Tensor, theirs: Tensor, bound: float) -> None:
    error = (ours - theirs).abs().amax(dim=-1) / theirs.abs().amax(dim=-1)
    worst = int(error.argmax())
    assert float(error[worst]) <= bound, f"position {worst} of {len(error)}: relative error {float(error[worst]):.2e}"


@pytest.mark.parametrize("name", TINY_CONFIGS)
def test_logits_equal_those_of_transformers_at_every_position(name: str, make: MakeExecutor, tmp_path: Path) -> None:
    model = write_tiny_model(name, tmp_path)
    source = random.Random(7)
    planner = planner_for(tmp_path, 1, make)
    prompts = [random_prompt(source, tokens) for tokens in (1, 7, 33, 101, 131)]
    sequences = [planner.admit(prompt) for prompt in prompts]
    planner.run_until_computed(sequences)
    for sequence, prompt in zip(sequences, prompts, strict=True):
        assert_close(torch.stack(sequence.logits), oracle_logits(model, prompt), MAX_RELATIVE_ERROR)


@pytest.mark.parametrize("name", TINY_CONFIGS)
@pytest.mark.parametrize("executor", ["torch", "native"])
def test_greedy_tokens_are_those_of_transformers_unless_two_logits_tie(
    name: str, executor: str, tmp_path: Path
) -> None:
    """Our 200 tokens are fed to the oracle once: each must be its own choice there, given the ones before."""
    model = write_tiny_model(name, tmp_path)
    source = random.Random(11)
    planner = planner_for(tmp_path, 3, EXECUTORS[executor])
    sequences = [planner.admit(random_prompt(source, tokens)) for tokens in (3, 38, 65)]
    prompt_tokens = [len(sequence.tokens) for sequence in sequences]
    planner.decode_greedily(sequences, tokens=200)
    for sequence, prompt in zip(sequences, prompt_tokens, strict=True):
        assert len(sequence.tokens) == prompt + 200
        logits = oracle_logits(model, sequence.tokens)[prompt - 1 : -1]
        best = logits.topk(2).values
        clear = (best[:, 0] - best[:, 1]) > NEAR_TIE * best[:, 0].abs()
        assert int(clear.sum()) > 190, "the model's logits are too flat for this test to mean anything"
        chosen = torch.tensor(sequence.tokens[prompt:])
        assert torch.equal(chosen[clear], logits.argmax(dim=-1)[clear])


def test_greedy_tokens_are_those_of_generate_with_its_own_cache(make: MakeExecutor, tmp_path: Path) -> None:
    model = write_tiny_model("llama3_scaled_rope_tied", tmp_path)
    prompt = random_prompt(random.Random(5), 45)
    prompt_tensor = torch.tensor([prompt])
    theirs = model.generate(
        prompt_tensor,
        # Without a mask, prompt tokens that equal the padding id would be hidden.
        attention_mask=torch.ones_like(prompt_tensor),
        max_new_tokens=200,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    planner = planner_for(tmp_path, 5, make)
    sequence = planner.admit(prompt)
    planner.decode_greedily([sequence], tokens=200)
    assert sequence.tokens == theirs[0].tolist()


def test_blocks_of_a_finished_sequence_do_not_leak_into_the_next(make: MakeExecutor, tmp_path: Path) -> None:
    model = write_tiny_model("qwen3", tmp_path)
    source = random.Random(13)
    planner = planner_for(tmp_path, 8, make)
    for _ in range(4):
        sequences = [planner.admit(random_prompt(source, source.randint(1, 250))) for _ in range(4)]
        planner.run_until_computed(sequences)
        for sequence in sequences:
            assert_close(torch.stack(sequence.logits), oracle_logits(model, sequence.tokens), MAX_RELATIVE_ERROR)
            planner.leave(sequence)


@pytest.mark.parametrize("name", ["llama_grouped", "qwen2_tied", "qwen3"])
def test_bfloat16_stays_within_its_rounding_of_float32(name: str, make: MakeExecutor, tmp_path: Path) -> None:
    """Against the oracle in float32 on the same bfloat16 weights, so that only activations are rounded differently."""
    model = write_tiny_model(name, tmp_path)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
    planner = planner_for(tmp_path, 2, make, dtype="bfloat16")
    sequence = planner.admit(random_prompt(random.Random(17), 131))
    planner.run_until_computed([sequence])
    ours, exact = torch.stack(sequence.logits), oracle_logits(model, sequence.tokens)
    error = (ours - exact).square().mean().sqrt() / exact.square().mean().sqrt()
    theirs = oracle_logits(model.bfloat16(), sequence.tokens).float()
    their_error = (theirs - exact).square().mean().sqrt() / exact.square().mean().sqrt()
    assert float(error) <= MAX_BFLOAT16_ERROR
    assert float(error) <= float(their_error)


@pytest.mark.parametrize("name", EMBEDDED_MODELS)
def test_embedded_models_are_computed_as_transformers_computes_them(name: str, make: MakeExecutor) -> None:
    """Trained weights have outliers that random ones lack, and config and tensors are those that ship."""
    folder = embedded_model_path(name)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    planner = planner_for(folder, 4, make)
    sequence = planner.admit(random_prompt(random.Random(23), 131))
    planner.run_until_computed([sequence])
    assert_close(torch.stack(sequence.logits), oracle_logits(model, sequence.tokens), MAX_RELATIVE_ERROR)


def test_only_the_rows_that_sample_reach_the_head(make: MakeExecutor, tmp_path: Path) -> None:
    """A chunk in the middle of a prompt samples nothing; the last row of the next one samples once."""
    model = write_tiny_model("qwen2", tmp_path)
    prompt = random_prompt(random.Random(19), 40)
    executor = planner_for(tmp_path, 1, make).executor

    def chunk(first: int, last: int, sample_rows: list[int]) -> Tensor:
        columns = {
            "token_ids": prompt[first:last],
            "positions": list(range(first, last)),
            "slot_mapping": list(range(64 + first, 64 + last)),
            "query_start": [0, last - first],
            "sequence_lengths": [last],
            "table_offsets": [1],
            "block_tables": [9, 2, 3],
            "sample_rows": sample_rows,
        }
        tensors = {name: torch.tensor(values, dtype=torch.int32) for name, values in columns.items()}
        return executor.forward(StepInputs(rows=last - first, sequences=1, samples=len(sample_rows), **tensors))

    assert tuple(chunk(0, 23, []).shape) == (0, VOCABULARY)
    logits = chunk(23, 40, [16])
    assert tuple(logits.shape) == (1, VOCABULARY)
    assert_close(logits, oracle_logits(model, prompt)[-1:], MAX_RELATIVE_ERROR)
