"""The spec: plain data, complete, and importable where torch is not installed."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from llmscale.errors import ConfigError
from llmscale.models.registry import describe_model
from llmscale.models.spec import ShardAxis
from tests.models_support import write_config


def test_only_what_reads_and_writes_weights_imports_torch() -> None:
    """A gateway describes a model on a machine that has no torch, so the import must not even be tried."""
    code = (
        "import importlib, pkgutil, sys\n"
        "sys.modules['torch'] = None\n"
        "import llmscale.models\n"
        "names = [module.name for module in pkgutil.iter_modules(llmscale.models.__path__)]\n"
        "assert 'loader' in names and 'qwen3' in names\n"
        "for name in names:\n"
        "    if name not in ('loader', 'open_files', 'quantizer', 'gguf_import'):\n"
        "        importlib.import_module('llmscale.models.' + name)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stderr


def test_fused_weights_name_their_parts_in_order(tmp_path: Path) -> None:
    write_config(tmp_path, attention_bias=True)
    spec = describe_model(tmp_path).spec
    qkv = spec.blocks[1].attention.qkv
    assert [part.name for part in qkv.weight.parts] == [
        "model.layers.1.self_attn.q_proj.weight",
        "model.layers.1.self_attn.k_proj.weight",
        "model.layers.1.self_attn.v_proj.weight",
    ]
    assert [part.shape for part in qkv.weight.parts] == [(24, 24), (8, 24), (8, 24)]
    assert qkv.weight.shape == (40, 24)
    assert qkv.bias is not None
    assert qkv.bias.shape == (40,)
    gate_up = spec.blocks[0].mlp.gate_up.weight
    assert [part.name.rsplit(".", 2)[1] for part in gate_up.parts] == ["gate_proj", "up_proj"]
    assert gate_up.shape == (80, 24)


def test_every_weight_says_how_ranks_cut_it(tmp_path: Path) -> None:
    write_config(tmp_path, attention_bias=True, mlp_bias=True)
    spec = describe_model(tmp_path).spec
    axes = {weight.name.removeprefix("blocks.0."): weight.shard_axis for weight in spec.weights()}
    assert axes["embedding"] is ShardAxis.VOCABULARY
    assert axes["head"] is ShardAxis.VOCABULARY
    assert axes["norm.weight"] is ShardAxis.NONE
    assert axes["attention_norm.weight"] is ShardAxis.NONE
    assert axes["attention.qkv.weight"] is ShardAxis.COLUMN
    assert axes["attention.qkv.bias"] is ShardAxis.COLUMN
    assert axes["attention.output.weight"] is ShardAxis.ROW
    assert axes["attention.output.bias"] is ShardAxis.NONE
    assert axes["mlp.gate_up.weight"] is ShardAxis.COLUMN
    assert axes["mlp.down.weight"] is ShardAxis.ROW
    assert axes["mlp.down.bias"] is ShardAxis.NONE
    assert {part.shard_multiple for part in spec.blocks[0].attention.qkv.weight.parts} == {8}


def test_a_pipeline_may_cut_between_any_two_blocks(tmp_path: Path) -> None:
    write_config(tmp_path, num_hidden_layers=4)
    assert describe_model(tmp_path).spec.pipeline_cuts == (1, 2, 3)


def test_parameters_count_a_tied_table_once(tmp_path: Path) -> None:
    write_config(tmp_path, tie_word_embeddings=False)
    untied = describe_model(tmp_path).spec
    write_config(tmp_path, tie_word_embeddings=True)
    tied = describe_model(tmp_path).spec
    assert tied.head.weight is tied.embedding
    assert untied.parameters - tied.parameters == 53 * 24
    block = 24 + 40 * 24 + 24 * 24 + 24 + 80 * 24 + 24 * 40
    assert tied.parameters == 53 * 24 + 2 * block + 24


def test_names_of_weights_are_unique(tmp_path: Path) -> None:
    write_config(tmp_path, attention_bias=True, mlp_bias=True)
    spec = describe_model(tmp_path).spec
    names = [weight.name for weight in spec.weights()]
    parts = [part.name for weight in spec.weights() for part in weight.parts]
    assert len(names) == len(set(names))
    assert len(parts) == len(set(parts))


def test_a_spec_cannot_be_changed(tmp_path: Path) -> None:
    write_config(tmp_path)
    spec = describe_model(tmp_path).spec
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.vocabulary = 1  # type: ignore[misc]
    assert hash(spec) == hash(describe_model(tmp_path).spec)


def test_a_longer_sequence_than_the_model_defines_is_refused_with_the_reason(tmp_path: Path) -> None:
    write_config(tmp_path)
    spec = describe_model(tmp_path).spec
    assert spec.sequence_limit(None) == 128
    assert spec.sequence_limit(128) == 128
    with pytest.raises(ConfigError, match=r"129.*2 to 128 \(max_position_embeddings in config.json\)"):
        spec.sequence_limit(129)
    with pytest.raises(ConfigError, match=r"--max-model-len\) is 1, .* Ask for more\.$"):
        spec.sequence_limit(1)
