"""Ranks' parts of a model: together they are the model, and what cannot be cut is refused with what could."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmscale.errors import ConfigError
from llmscale.models.registry import describe_model
from llmscale.models.shard import RankPlace, shard_model, whole_model
from llmscale.models.spec import ModelSpec, ShardAxis
from tests.models_support import write_config


def spec_of(folder: Path, **changes: object) -> ModelSpec:
    write_config(folder, **changes)
    return describe_model(folder).spec


@pytest.mark.parametrize(("tensor_size", "stages"), [(1, 1), (2, 1), (4, 1), (1, 2), (2, 2), (4, 3)])
def test_the_ranks_of_a_stage_cover_every_cut_tensor_once(tensor_size: int, stages: int, tmp_path: Path) -> None:
    spec = spec_of(tmp_path, num_attention_heads=8, num_key_value_heads=4, num_hidden_layers=3, head_dim=8)
    parts = [shard_model(spec, RankPlace.of_rank(rank, tensor_size, stages)) for rank in range(tensor_size * stages)]
    seen: dict[str, list[int]] = {}
    shapes = {part.name: part.shape for weight in spec.weights() for part in weight.parts}
    axes = {part.name: weight.shard_axis for weight in spec.weights() for part in weight.parts}
    for part in parts:
        for weight in part.spec.weights():
            for tensor in weight.parts:
                cut = part.slices.get(tensor.name)
                axis = 1 if axes[tensor.name] is ShardAxis.ROW else 0
                rows = range(cut.start, cut.stop) if cut else range(shapes[tensor.name][axis])
                assert len(rows) == tensor.shape[axis], tensor.name
                seen.setdefault(tensor.name, []).extend(rows)
    assert seen.keys() == shapes.keys()
    for name, rows in seen.items():
        axis = 1 if axes[name] is ShardAxis.ROW else 0
        copies = tensor_size if axes[name] is ShardAxis.NONE else 1
        assert sorted(rows) == sorted(list(range(shapes[name][axis])) * copies), name
    assert sum(len(part.spec.blocks) for part in parts) == tensor_size * len(spec.blocks)


def test_ranks_share_a_key_value_head_where_there_are_more_ranks_than_heads(tmp_path: Path) -> None:
    spec = spec_of(tmp_path, num_attention_heads=8, num_key_value_heads=2, head_dim=8)
    key = "model.layers.0.self_attn.k_proj.weight"
    slices = [shard_model(spec, RankPlace(rank, 4)).slices[key] for rank in range(4)]
    assert [(cut.start, cut.stop) for cut in slices] == [(0, 8), (0, 8), (8, 16), (8, 16)]
    assert shard_model(spec, RankPlace(3, 4)).spec.blocks[0].attention.kv_heads == 1


def test_one_rank_adds_the_bias_of_a_row_cut_product(tmp_path: Path) -> None:
    spec = spec_of(tmp_path, num_attention_heads=4, num_key_value_heads=4, attention_bias=True, mlp_bias=True)
    biases = [shard_model(spec, RankPlace(rank, 2)).spec.blocks[0].mlp.down.bias for rank in range(2)]
    assert biases[0] is not None
    assert biases[1] is None


def test_vocabulary_and_features_need_not_divide_evenly(tmp_path: Path) -> None:
    spec = spec_of(tmp_path, num_attention_heads=4, num_key_value_heads=4, intermediate_size=41, vocab_size=53)
    parts = [shard_model(spec, RankPlace(rank, 4)) for rank in range(4)]
    assert [part.spec.vocabulary for part in parts] == [13, 13, 13, 14]
    assert parts[0].vocabulary_widths == (13, 13, 13, 14)
    assert [part.vocabulary_start for part in parts] == [0, 13, 26, 39]
    assert [part.spec.blocks[0].mlp.inner_size for part in parts] == [10, 10, 10, 11]


def test_only_the_ends_of_a_pipeline_have_embedding_and_head(tmp_path: Path) -> None:
    for tied in (False, True):
        spec = spec_of(tmp_path, num_hidden_layers=3, tie_word_embeddings=tied)
        names = [
            {weight.name for weight in shard_model(spec, RankPlace(stage=at, stages=3)).spec.weights()}
            for at in range(3)
        ]
        assert ["embedding" in held for held in names] == [True, False, tied]
        assert ["norm.weight" in held for held in names] == [False, False, True]


def test_a_rank_that_is_alone_has_the_model_itself(tmp_path: Path) -> None:
    spec = spec_of(tmp_path)
    assert shard_model(spec, RankPlace()) == whole_model(spec)
    assert whole_model(spec).spec is spec


@pytest.mark.parametrize(
    ("place", "says"),
    [
        (RankPlace(0, 2), "3 query heads and 1 key-value heads can be cut into 1, 3"),
        (RankPlace(stage=0, stages=3), "3 pipeline stages were asked for; this model of 2 layers can be cut into 2"),
    ],
)
def test_what_cannot_be_cut_is_refused_with_what_can(place: RankPlace, says: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=says):
        shard_model(spec_of(tmp_path), place)


@pytest.mark.parametrize(
    "numbers", [(0, 0, 0, 1), (2, 2, 0, 1), (-1, 2, 0, 1), (0, 1, 1, 1), (0, 1, 0, 0), (0, 64, 0, 64)]
)
def test_a_place_that_does_not_exist_is_refused(numbers: tuple[int, int, int, int]) -> None:
    with pytest.raises(ConfigError):
        RankPlace(*numbers)
    assert RankPlace.of_rank(5, 2, 3) == RankPlace(1, 2, 2, 3)
    assert [RankPlace.of_rank(rank, 2, 3).is_leader for rank in range(6)] == [False, False, False, False, True, False]
