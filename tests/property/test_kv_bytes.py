"""Keys and values kept as bytes: exactly the model whose cache is rounded so, and no bit that depends on batches.

Method: random tiny checkpoints of every architecture and the embedded models by the native executor with
`kv_dtype="int8"`, against transformers in float32 whose attention gets rounded keys and values, against transformers
as it is, and against itself in other batches.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from llmscale.embedded import EMBEDDED_MODELS, embedded_model_path
from llmscale.worker.step import StepLimits
from tests.models_support import TINY_CONFIGS, VOCABULARY, NativeExecutor, RandomPlanner, write_tiny_model

MAX_ERROR_OF_ROUNDED = 0.005
"""Of the root mean square of the logits, against attention with rounded rows: a code that falls to the other side of a
tie moves an element by a hundredth of the row's largest. Measured 1e-6 where none does, up to 0.0024 where one does."""
MAX_ERROR = 0.1
"""The same against unrounded rows. Random weights have peaked attention, which trained ones have not.
Measured 0.005 to 0.074."""
MAX_ERROR_OF_TRAINED = 0.02
"""Measured 0.012 and 0.012."""
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


def rounded_rows(rows: Tensor) -> Tensor:
    """Every row (the last dimension) as `round(x * 127 / max|x|)` times its scale."""
    largest = rows.abs().amax(dim=-1, keepdim=True)
    return (rows * (127 / largest.clamp_min(1e-36))).round() * (largest / 127)


@pytest.fixture
def round_the_oracle(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], None]:
    """Makes a model's attention round its keys, after their rotation, and its values."""

    def rounding(model: Any) -> None:
        code = sys.modules[type(model).__module__]
        attend = code.eager_attention_forward

        def attend_rounded(module: Any, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **named: Any) -> Any:
            return attend(module, query, rounded_rows(key), rounded_rows(value), *rest, **named)

        monkeypatch.setattr(code, "eager_attention_forward", attend_rounded)

    return rounding


@pytest.mark.parametrize("name", TINY_CONFIGS)
def test_logits_are_those_of_transformers_with_rounded_keys_and_values(
    name: str, tmp_path: Path, round_the_oracle: Callable[[Any], None]
) -> None:
    model = write_tiny_model(name, tmp_path)
    prompts = prompts_of((1, 33, 131, 300))
    unrounded = [oracle_logits(model, prompt) for prompt in prompts]
    round_the_oracle(model)
    rounded = [oracle_logits(model, prompt) for prompt in prompts]
    ours = logits_of(planner_for(tmp_path, 1), prompts)
    for logits, exact, plain in zip(ours, rounded, unrounded, strict=True):
        assert relative_error(logits, exact) <= MAX_ERROR_OF_ROUNDED
        assert relative_error(logits, plain) <= MAX_ERROR
    # Both say something: rounding shows in the logits.
    assert relative_error(ours[-1], unrounded[-1]) > 3 * relative_error(ours[-1], rounded[-1])


@pytest.mark.parametrize("name", EMBEDDED_MODELS)
def test_trained_weights_lose_little(name: str, round_the_oracle: Callable[[Any], None]) -> None:
    """They have outliers that random ones lack, and attention that is less peaked."""
    folder = embedded_model_path(name)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    (prompt,) = prompts_of((300,))
    (ours,) = logits_of(planner_for(folder, 4), [prompt])
    plain = oracle_logits(model, prompt)
    round_the_oracle(model)
    assert relative_error(ours, plain) <= MAX_ERROR_OF_TRAINED
    assert relative_error(ours, oracle_logits(model, prompt)) <= MAX_ERROR_OF_ROUNDED


@pytest.mark.parametrize("name", ["llama_grouped", "qwen2_tied", "qwen3"])
def test_activations_in_bfloat16_go_with_bytes(name: str, tmp_path: Path) -> None:
    """Against float32 with bytes: what bfloat16 adds is what it adds without bytes."""
    write_tiny_model(name, tmp_path)
    (prompt,) = prompts_of((131,))

    def logits(dtype: str, kv_dtype: str) -> Tensor:
        return logits_of(planner_for(tmp_path, 2, dtype, kv_dtype), [prompt])[0]

    with_bytes = relative_error(logits("bfloat16", "int8"), logits("float32", "int8"))
    without = relative_error(logits("bfloat16", "auto"), logits("float32", "auto"))
    assert with_bytes <= 2 * without


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
