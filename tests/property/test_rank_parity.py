"""Several ranks against one, and against transformers: every architecture, cut along heads, features, vocabulary and
layers, in random batches and chunks.

Goal: a replica of many ranks is the same model. Method: ranks as threads over the memory that ranks of one host share;
logits of every position within the bound that one rank has, then 200 greedy tokens up to ties.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from llmscale.models.registry import describe_model
from tests.fakes.rank_threads import RankThreads
from tests.models_support import TINY_CONFIGS, RandomPlanner, write_tiny_model
from tests.property.test_model_parity import (
    LIMITS,
    MAX_RELATIVE_ERROR,
    NEAR_TIE,
    assert_close,
    oracle_logits,
    random_prompt,
)

BLOCKS = 48
pytestmark = pytest.mark.usefixtures("one_thread")


def layouts(name: str, folder: Path) -> list[tuple[int, int]]:
    """(tensor size, stages) that a model can be cut into, up to 4 ranks."""
    spec = describe_model(folder).spec
    attention = spec.blocks[0].attention
    queries, kv = attention.query_heads, attention.kv_heads
    sizes = [size for size in (1, 2, 3, 4) if queries % size == 0 and (kv % size == 0 or size % kv == 0)]
    assert len(sizes) > 1, f"{name} cannot be cut"
    stages = min(2, len(spec.blocks))
    return [*((size, 1) for size in sizes[1:]), (1, len(spec.blocks)), (sizes[1], stages)]


@pytest.mark.parametrize("name", TINY_CONFIGS)
def test_ranks_compute_the_logits_of_transformers_at_every_position(name: str, tmp_path: Path) -> None:
    model = write_tiny_model(name, tmp_path)
    prompts = [random_prompt(random.Random(7), tokens) for tokens in (1, 7, 33, 101)]
    expected = [oracle_logits(model, prompt) for prompt in prompts]
    for tensor_size, stages in layouts(name, tmp_path):
        with RankThreads(tmp_path, tensor_size, stages, "float32", BLOCKS, LIMITS) as ranks:
            planner = RandomPlanner(ranks, ranks.region, LIMITS, seed=1)
            sequences = [planner.admit(prompt) for prompt in prompts]
            planner.run_until_computed(sequences)
        for sequence, logits in zip(sequences, expected, strict=True):
            assert_close(torch.stack(sequence.logits), logits, MAX_RELATIVE_ERROR)


@pytest.mark.parametrize(("tensor_size", "stages"), [(2, 1), (4, 1), (1, 3), (2, 2)])
def test_greedy_tokens_of_ranks_are_those_of_one_up_to_ties(tensor_size: int, stages: int, tmp_path: Path) -> None:
    model = write_tiny_model("llama2_without_grouping", tmp_path)
    with RankThreads(tmp_path, tensor_size, stages, "float32", BLOCKS, LIMITS) as ranks:
        planner = RandomPlanner(ranks, ranks.region, LIMITS, seed=3)
        sequences = [planner.admit(random_prompt(random.Random(11), tokens)) for tokens in (3, 38)]
        prompt_tokens = [len(sequence.tokens) for sequence in sequences]
        planner.decode_greedily(sequences, tokens=200)
    for sequence, prompt in zip(sequences, prompt_tokens, strict=True):
        logits = oracle_logits(model, sequence.tokens)[prompt - 1 : -1]
        best = logits.topk(2).values
        clear = (best[:, 0] - best[:, 1]) > NEAR_TIE * best[:, 0].abs()
        assert int(clear.sum()) > 190, "the model's logits are too flat for this test to mean anything"
        assert torch.equal(torch.tensor(sequence.tokens[prompt:])[clear], logits.argmax(dim=-1)[clear])


def test_stages_alone_change_no_bit(tmp_path: Path) -> None:
    """Only sums over tensor-parallel ranks are in another order; a pipeline computes what one rank does."""
    write_tiny_model("qwen3", tmp_path)
    prompt = random_prompt(random.Random(5), 90)
    results = []
    for stages in (1, 2):
        with RankThreads(tmp_path, 1, stages, "bfloat16", BLOCKS, LIMITS) as ranks:
            planner = RandomPlanner(ranks, ranks.region, LIMITS, seed=9)
            sequence = planner.admit(prompt)
            planner.run_until_computed([sequence])
            results.append(torch.stack(sequence.logits))
    assert torch.equal(*results)
