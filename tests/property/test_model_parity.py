"""Random tiny checkpoints of every architecture against transformers, alone and in random batches and chunks.

Goal: an executor computes exactly the model that the checkpoint's authors mean, however the engine cuts and mixes the
work. Method: the same weights in transformers (eager attention, float32) and in `TorchExecutor`; logits of every
position are compared, then 200 greedy tokens.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llmscale.layers.reference import ReferenceOps
from llmscale.models.loader import LoadOptions, load_weights
from llmscale.models.registry import describe_model
from llmscale.worker.executor_torch import TorchExecutor
from llmscale.worker.kv_region import KvRegion, kv_layout
from llmscale.worker.step import StepLimits
from tests.models_support import TINY_CONFIGS, VOCABULARY, RandomPlanner, write_tiny_model

MAX_RELATIVE_ERROR = 1e-4
"""Of the largest logit of the position; float32 sums of 100 terms in another order differ by about 1e-6."""
NEAR_TIE = 1e-4
LIMITS = StepLimits(max_step_tokens=96, max_sequences=96, max_sequence_tokens=320)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Two threads on tiny products only wait for each other, a hundred times longer when the machine is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def planner_for(folder: Path, seed: int, dtype: str = "float32") -> RandomPlanner:
    model = describe_model(folder)
    weights = load_weights(model.folder, model.spec, LoadOptions(dtype=dtype))
    region = KvRegion(kv_layout(model.spec, weights.dtype), blocks=48)
    return RandomPlanner(TorchExecutor(model.spec, weights, region, ReferenceOps(), LIMITS), region, LIMITS, seed)


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
def test_logits_equal_those_of_transformers_at_every_position(name: str, tmp_path: Path) -> None:
    model = write_tiny_model(name, tmp_path)
    source = random.Random(7)
    planner = planner_for(tmp_path, seed=1)
    prompts = [random_prompt(source, tokens) for tokens in (1, 7, 33, 101, 131)]
    sequences = [planner.admit(prompt) for prompt in prompts]
    planner.run_until_computed(sequences)
    for sequence, prompt in zip(sequences, prompts, strict=True):
        assert_close(torch.stack(sequence.logits), oracle_logits(model, prompt), MAX_RELATIVE_ERROR)
