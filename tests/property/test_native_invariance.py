"""The native executor gives a position the same bits whatever runs beside it, however prompts are cut, on any number of
threads, at every instruction level.

Method: the same tokens through random batches and chunks with scattered blocks, drawn differently for each number of
threads; logits of all positions are compared bit for bit with those of one plan on one thread.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from torch import Tensor

from llmscale._core import CpuKernels
from llmscale.errors import ConfigError
from llmscale.worker.step import StepLimits
from tests.models_support import VOCABULARY, NativeExecutor, RandomPlanner, write_tiny_model

# Every row of a step samples.
LIMITS = StepLimits(max_step_tokens=64, max_sequences=64, max_sequence_tokens=192)
BLOCKS = 48
# Grouped and windowed attention, norms of heads, biases; inputs that groups of 32 divide for four bits.
CASES = [
    ("llama_with_biases", "float32", None),
    ("mistral_with_window", "bfloat16", None),
    ("qwen3", "bfloat16", None),
    ("llama_grouped", "bfloat16", "int8"),
    ("qwen2_tied", "float32", "int8"),
    ("llama_of_whole_groups", "bfloat16", "int4"),
]
LEVELS = ("portable", "avx2", "avx512", "avx512bf16")


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every level that this machine has."""
    monkeypatch.setenv("LLMSCALE_CPU_LEVEL", request.param)
    try:
        CpuKernels("float32", threads=1, level=request.param)
    except ConfigError as error:
        pytest.skip(str(error))
    return str(request.param)


def logits(folder: Path, dtype: str, quantization: str | None, threads: int, seed: int) -> list[Tensor]:
    executor = NativeExecutor(folder, dtype, LIMITS, BLOCKS, quantization=quantization, threads=threads)
    planner = RandomPlanner(executor, executor.region, LIMITS, seed)
    source = random.Random(5)
    prompts = [[source.randrange(VOCABULARY) for _ in range(tokens)] for tokens in (1, 5, 40, 97, 130)]
    sequences = [planner.admit(prompt) for prompt in prompts]
    planner.run_until_computed(sequences)
    return [torch.stack(sequence.logits) for sequence in sequences]


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize(("name", "dtype", "quantization"), CASES)
def test_bits_depend_on_a_sequence_alone(name: str, dtype: str, quantization: str | None, tmp_path: Path) -> None:
    write_tiny_model(name, tmp_path)
    expected = logits(tmp_path, dtype, quantization, threads=1, seed=1)
    for threads, seed in ((1, 2), (2, 3), (3, 4)):
        for prompt, (ours, theirs) in enumerate(
            zip(logits(tmp_path, dtype, quantization, threads, seed), expected, strict=True)
        ):
            assert torch.equal(ours, theirs), f"prompt {prompt}, {threads} threads"
