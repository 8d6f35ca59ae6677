"""A pipeline is cut so that its slowest stage is as fast as can be."""

from __future__ import annotations

from itertools import combinations, pairwise
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from llmscale.models.registry import describe_model
from llmscale.models.stages import divide, stage_layers
from tests.models_support import write_config


def slowest(costs: list[int], last_cost: int, bounds: tuple[int, ...]) -> int:
    sums = [sum(costs[start:stop]) for start, stop in pairwise(bounds)]
    return max(*sums[:-1], sums[-1] + last_cost) if len(sums) > 1 else sums[0] + last_cost


@given(st.lists(st.integers(1, 50), min_size=1, max_size=9), st.integers(0, 120), st.data())
def test_no_other_cut_has_a_faster_slowest_stage(costs: list[int], last_cost: int, data: st.DataObject) -> None:
    parts = data.draw(st.integers(1, len(costs)))
    bounds = divide(costs, last_cost, parts)
    assert bounds[0] == 0
    assert bounds[-1] == len(costs)
    assert len(bounds) == parts + 1
    assert all(start < stop for start, stop in pairwise(bounds)), "no stage is empty"
    others = ((0, *inner, len(costs)) for inner in combinations(range(1, len(costs)), parts - 1))
    assert slowest(costs, last_cost, bounds) == min(slowest(costs, last_cost, other) for other in others)


def test_the_last_part_counts_as_what_it_costs() -> None:
    assert divide([3] * 30, 24, 2) == (0, 19, 30)
    assert divide([3] * 30, 0, 2) == (0, 15, 30)
    assert divide([3] * 4, 1_000, 2) == (0, 3, 4)


def test_a_large_head_is_worth_fewer_layers_than_it_weighs(tmp_path: Path) -> None:
    """It weighs as much as 8 of these layers and takes the time of 4 to 6."""
    shape = {"hidden_size": 576, "intermediate_size": 1_536, "num_hidden_layers": 30, "vocab_size": 49_152}
    write_config(tmp_path, **shape, num_attention_heads=9, num_key_value_heads=3, head_dim=64)
    assert stage_layers(describe_model(tmp_path).spec, 2) == (0, 17, 30)
