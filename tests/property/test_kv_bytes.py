"""Keys and values kept as bytes: what it costs in logits, and that chunks and batches still change no bit.

Method: random tiny checkpoints of every architecture and the embedded models by the native executor with
`kv_dtype="int8"`, against transformers in float32 and against itself in other batches.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from llmscale.embedded import EMBEDDED_MODELS, embedded_model_path
from llmscale.worker.step import StepLimits
from tests.models_support import TINY_CONFIGS, VOCABULARY, NativeExecutor, RandomPlanner, write_tiny_model

MAX_ERROR = 0.02
"""Root mean square over that of the logits."""
MAX_BFLOAT16_ERROR = 0.05
"""The bound of bfloat16 with its own keys and values, see test_model_parity.py."""
LIMITS = StepLimits(max_step_tokens=96, max_sequences=96, max_sequence_tokens=320)
BLOCKS = 48

pytestmark = pytest.mark.usefixtures("one_thread")


def planner_for(folder: Path, seed: int, dtype: str = "float32", kv_dtype: str = "int8") -> RandomPlanner:
    executor = NativeExecutor(folder, dtype, LIMITS, BLOCKS, kv_dtype=kv_dtype)
    return RandomPlanner(executor, executor.region, LIMITS, seed)


def prompts_of(tokens: tuple[int, ...]) -> list[list[int]]:
    source = random.Random(7)
    return [[source.randrange(VOCABULARY) for _ in range(count)] for count in tokens]


def logits_of(planner: RandomPlanner, prompts: list[list[int]]) -> list[Tensor]:
    sequences = [planner.admit(prompt) for prompt in prompts]
    planner.run_until_computed(sequences)
    return [torch.stack(sequence.logits) for sequence in sequences]


def oracle_logits(model: Any, tokens: list[int]) -> Tensor:
    with torch.inference_mode():
        logits: Tensor = model(torch.tensor([tokens])).logits[0]
    return logits


def relative_error(ours: Tensor, exact: Tensor) -> float:
    return float((ours - exact).square().mean().sqrt() / exact.square().mean().sqrt())


@pytest.mark.parametrize("name", TINY_CONFIGS)
def test_logits_stay_near_those_of_transformers(name: str, tmp_path: Path) -> None:
    model = write_tiny_model(name, tmp_path)
    prompts = prompts_of((1, 33, 131, 300))
    exact = [oracle_logits(model, prompt) for prompt in prompts]
    for ours, theirs in zip(logits_of(planner_for(tmp_path, 1), prompts), exact, strict=True):
        error = relative_error(ours, theirs)
        print(name, len(ours), f"{error:.5f}")
        assert error <= MAX_ERROR
        # Bytes it is: kept as float32, errors are a thousand times less.
        assert error >= 1e-5


@pytest.mark.parametrize("name", ["llama_grouped", "qwen2_tied", "qwen3"])
def test_bfloat16_with_bytes_stays_within_the_bound_of_bfloat16(name: str, tmp_path: Path) -> None:
    model = write_tiny_model(name, tmp_path)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
    (prompt,) = prompts_of((131,))
    exact = oracle_logits(model, prompt)
    errors = [
        relative_error(logits_of(planner_for(tmp_path, 2, "bfloat16", kv_dtype), [prompt])[0], exact)
        for kv_dtype in ("auto", "int8")
    ]
    print(name, errors)
    assert errors[1] <= MAX_BFLOAT16_ERROR


@pytest.mark.parametrize("name", EMBEDDED_MODELS)
def test_trained_weights_stay_near_too(name: str) -> None:
    """They have outliers that random ones lack."""
    folder = embedded_model_path(name)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    (prompt,) = prompts_of((300,))
    error = relative_error(logits_of(planner_for(folder, 4), [prompt])[0], oracle_logits(model, prompt))
    print(name, error)
    assert error <= MAX_ERROR


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["llama_grouped", "mistral_with_window", "qwen3"])
def test_other_batches_and_chunks_change_no_bit(name: str, dtype: str, tmp_path: Path) -> None:
    write_tiny_model(name, tmp_path)
    prompts = prompts_of((3, 65, 140, 301))
    first = logits_of(planner_for(tmp_path, 1, dtype), prompts)
    for seed in (2, 3):
        for ours, theirs in zip(logits_of(planner_for(tmp_path, seed, dtype), prompts), first, strict=True):
            assert torch.equal(ours, theirs)


def test_blocks_of_a_finished_sequence_do_not_leak_into_the_next(tmp_path: Path) -> None:
    write_tiny_model("qwen3", tmp_path)
    source = random.Random(13)
    planner = planner_for(tmp_path, 8)
    for _ in range(3):
        prompts = [[source.randrange(VOCABULARY) for _ in range(source.randint(1, 250))] for _ in range(4)]
        sequences = [planner.admit(prompt) for prompt in prompts]
        planner.run_until_computed(sequences)
        fresh = logits_of(planner_for(tmp_path, 9), prompts)
        for sequence, expected in zip(sequences, fresh, strict=True):
            assert torch.equal(torch.stack(sequence.logits), expected)
            planner.leave(sequence)
