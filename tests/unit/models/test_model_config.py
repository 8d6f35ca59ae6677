"""config.json and generation_config.json: both spellings, every bound, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llmscale.errors import InvalidCheckpoint, ModelError, UnsupportedModel
from llmscale.models.registry import ARCHITECTURES, describe_model
from llmscale.models.spec import ModelSpec, RopeScaling
from tests.models_support import LLAMA_CONFIG, write_config

LLAMA3_ROPE = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def spec_of(folder: Path, **changes: object) -> ModelSpec:
    write_config(folder, **changes)
    return describe_model(folder).spec


@pytest.mark.parametrize(
    ("scaling", "rope_type_key"),
    [
        (None, "rope_type"),
        ({"factor": 2.5, "kind": "linear"}, "type"),
        ({"factor": 2.5, "kind": "linear"}, "rope_type"),
        ({"kind": "llama3", **LLAMA3_ROPE}, "rope_type"),
        ({"kind": "dynamic", "factor": 2.0}, "type"),
    ],
)
def test_both_spellings_of_rotary_parameters_mean_the_same(
    tmp_path: Path, scaling: dict[str, object] | None, rope_type_key: str
) -> None:
    values = dict(scaling or {"kind": "default"})
    kind = values.pop("kind")
    old = spec_of(
        tmp_path, rope_theta=5000.0, rope_scaling=None if scaling is None else {rope_type_key: kind, **values}
    )
    write_config(tmp_path, rope_parameters={"rope_type": kind, "rope_theta": 5000.0, **values})
    config = json.loads((tmp_path / "config.json").read_text())
    del config["rope_theta"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert describe_model(tmp_path).spec == old
    assert old.blocks[0].attention.rope.theta == 5000.0


def test_rope_scaling_decides_how_long_a_sequence_may_be(tmp_path: Path) -> None:
    assert spec_of(tmp_path).max_sequence_tokens == 128
    linear = spec_of(tmp_path, rope_scaling={"type": "linear", "factor": 2.5})
    assert linear.max_sequence_tokens == 320
    llama3 = spec_of(tmp_path, rope_scaling={"rope_type": "llama3", **LLAMA3_ROPE})
    assert llama3.max_sequence_tokens == 128
    assert llama3.blocks[0].attention.rope.scaling is RopeScaling.LLAMA3
    dynamic = spec_of(tmp_path, rope_scaling={"type": "dynamic", "factor": 4.0})
    assert dynamic.max_sequence_tokens == 128
    assert "dynamic rope scaling is not extended" in dynamic.max_sequence_reason
    assert dynamic.blocks[0].attention.rope.scaling is RopeScaling.NONE


def test_absent_fields_take_the_values_that_transformers_gives_them(tmp_path: Path) -> None:
    config = dict(LLAMA_CONFIG)
    for name in ("num_key_value_heads", "head_dim", "rms_norm_eps", "rope_theta", "tie_word_embeddings", "hidden_act"):
        del config[name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    spec = describe_model(tmp_path).spec
    attention = spec.blocks[0].attention
    assert (attention.kv_heads, attention.head_dim, attention.rope.theta) == (3, 8, 10_000.0)
    assert spec.norm.epsilon == 1e-6
    assert not spec.head.tied


def test_qwen3_has_heads_of_128_where_the_config_is_silent(tmp_path: Path) -> None:
    spec = spec_of(tmp_path, architectures=["Qwen3ForCausalLM"], head_dim=None)
    assert spec.blocks[0].attention.head_dim == 128
    assert spec.blocks[0].attention.query_norm is not None


def test_qwen2_has_biases_on_q_k_v_only(tmp_path: Path) -> None:
    attention = spec_of(tmp_path, architectures=["Qwen2ForCausalLM"]).blocks[0].attention
    assert attention.qkv.bias is not None
    assert attention.output.bias is None


def test_qwen_windows_are_off_unless_the_config_turns_them_on(tmp_path: Path) -> None:
    def windows(**changes: object) -> list[int | None]:
        spec = spec_of(tmp_path, architectures=["Qwen2ForCausalLM"], num_hidden_layers=3, **changes)
        return [block.attention.window_tokens for block in spec.blocks]

    assert windows(sliding_window=16, max_window_layers=1) == [None, None, None]
    assert windows(sliding_window=16, max_window_layers=1, use_sliding_window=True) == [None, 16, 16]
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    assert windows(sliding_window=16, use_sliding_window=True, layer_types=kinds) == [16, None, 16]
    with pytest.raises(UnsupportedModel, match="layer_types"):
        windows(sliding_window=16, use_sliding_window=True, layer_types=["chunked_attention"] * 3)


def test_mistral_windows_every_layer(tmp_path: Path) -> None:
    windowed = spec_of(tmp_path, architectures=["MistralForCausalLM"], sliding_window=32)
    assert {block.attention.window_tokens for block in windowed.blocks} == {32}
    full = spec_of(tmp_path, architectures=["MistralForCausalLM"], sliding_window=None)
    assert {block.attention.window_tokens for block in full.blocks} == {None}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"hidden_size": 0}, InvalidCheckpoint, "hidden_size is 0, expected an integer from 1 to 131,072"),
        ({"hidden_size": 1 << 40}, InvalidCheckpoint, "hidden_size"),
        ({"hidden_size": 24.0}, InvalidCheckpoint, "hidden_size is 24.0"),
        ({"hidden_size": True}, InvalidCheckpoint, "hidden_size is True"),
        ({"hidden_size": "24"}, InvalidCheckpoint, "hidden_size is '24'"),
        ({"hidden_size": None}, InvalidCheckpoint, "no field 'hidden_size'"),
        ({"num_hidden_layers": 100_000}, InvalidCheckpoint, "num_hidden_layers"),
        ({"intermediate_size": -1}, InvalidCheckpoint, "intermediate_size"),
        ({"vocab_size": 1 << 30}, InvalidCheckpoint, "vocab_size"),
        ({"num_key_value_heads": 2}, InvalidCheckpoint, "multiple of num_key_value_heads"),
        ({"head_dim": None, "num_attention_heads": 5, "num_key_value_heads": 5}, InvalidCheckpoint, "head_dim is not"),
        ({"head_dim": 12}, UnsupportedModel, "heads have 12 elements"),
        ({"head_dim": 264}, InvalidCheckpoint, "head_dim is 264"),
        ({"rms_norm_eps": -1e-5}, InvalidCheckpoint, "rms_norm_eps"),
        ({"rms_norm_eps": "1e-5"}, InvalidCheckpoint, "rms_norm_eps"),
        ({"max_position_embeddings": 1 << 60}, InvalidCheckpoint, "max_position_embeddings"),
        ({"tie_word_embeddings": 1}, InvalidCheckpoint, "tie_word_embeddings is 1, expected true or false"),
        ({"hidden_act": "gelu"}, UnsupportedModel, "hidden_act is 'gelu'"),
        ({"eos_token_id": 53}, InvalidCheckpoint, "eos_token_id is 53, expected an id of the vocabulary, 0 to 52"),
        ({"eos_token_id": [1, -1]}, InvalidCheckpoint, "eos_token_id is -1"),
        ({"eos_token_id": list(range(50)) * 2}, InvalidCheckpoint, "at most 64 ids"),
        ({"rope_theta": 0.0}, InvalidCheckpoint, "rope_theta"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, UnsupportedModel, "'yarn' is not implemented"),
        ({"rope_scaling": {"type": "linear"}}, InvalidCheckpoint, "no field 'factor'"),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, InvalidCheckpoint, "factor is 0.5"),
        ({"rope_scaling": [1]}, InvalidCheckpoint, "rope_scaling"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, InvalidCheckpoint, "low_freq_factor"),
        (
            {"rope_scaling": {"rope_type": "llama3", **LLAMA3_ROPE, "high_freq_factor": 1.0}},
            InvalidCheckpoint,
            "high_freq_factor is 1",
        ),
        ({"partial_rotary_factor": 0.5}, UnsupportedModel, "partial_rotary_factor is 0.5"),
        ({"rope_parameters": {"partial_rotary_factor": 0.25}}, UnsupportedModel, "partial_rotary_factor is 0.25"),
        ({"architectures": ["GPT2LMHeadModel"]}, UnsupportedModel, "GPT2LMHeadModel; expected one of LlamaForCausalLM"),
        ({"architectures": None}, UnsupportedModel, "architectures is none"),
        ({"architectures": "LlamaForCausalLM"}, InvalidCheckpoint, "a list of strings"),
        ({"auto_map": {"AutoModel": "modeling.Model"}}, UnsupportedModel, "run Python code"),
        (
            {"quantization_config": {"quant_method": "hqq"}},
            UnsupportedModel,
            "quant_method is 'hqq'; implemented are awq",
        ),
        ({"compression_config": {"x": 1}}, UnsupportedModel, "quant_method is 'unknown'"),
    ],
)
def test_a_config_outside_its_bounds_is_refused_by_field(
    tmp_path: Path, changes: dict[str, object], error: type[ModelError], message: str
) -> None:
    write_config(tmp_path, **changes)
    with pytest.raises(error, match=message):
        describe_model(tmp_path)


def test_a_product_of_allowed_sizes_may_still_be_too_large(tmp_path: Path) -> None:
    write_config(tmp_path, hidden_size=1 << 17, intermediate_size=1 << 20, num_hidden_layers=1024)
    with pytest.raises(InvalidCheckpoint, match="parameters, the limit is"):
        describe_model(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"hidden_size": 1, "hidden_size": 2}', "key 'hidden_size' appears twice"),
        ('{"rms_norm_eps": NaN}', "NaN is not JSON"),
        ('{"rms_norm_eps": Infinity}', "Infinity is not JSON"),
        ("[" * 100_000, "is not valid JSON"),
        ("[1]", "holds a JSON list"),
        ('{"hidden_size": ' + "9" * 10_000 + "}", "is not valid JSON"),
        ("", "is not valid JSON"),
    ],
)
def test_malformed_json_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(InvalidCheckpoint, match=message):
        describe_model(tmp_path)


def test_text_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(b'{"a": "\xff"}')
    with pytest.raises(InvalidCheckpoint, match="is not valid JSON"):
        describe_model(tmp_path)


def test_a_huge_config_is_refused_before_it_is_read(tmp_path: Path) -> None:
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(InvalidCheckpoint, match="the limit is 67,108,864"):
        describe_model(tmp_path)


def test_errors_do_not_repeat_megabytes_of_a_hostile_value(tmp_path: Path) -> None:
    write_config(tmp_path, hidden_act=["x" * 1_000_000])
    with pytest.raises(InvalidCheckpoint) as caught:
        describe_model(tmp_path)
    assert len(str(caught.value)) < 300


def test_generation_config_gives_sampling_defaults_and_more_ends(tmp_path: Path) -> None:
    write_config(tmp_path)
    assert describe_model(tmp_path).defaults.eos_token_ids == (2,)
    generation = {"eos_token_id": [2, 7], "do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 20}
    (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    defaults = describe_model(tmp_path).defaults
    assert defaults.eos_token_ids == (2, 7)
    assert (defaults.greedy, defaults.temperature, defaults.top_p, defaults.top_k) == (False, 0.6, 0.9, 20)
    assert (defaults.min_p, defaults.repetition_penalty) == (None, None)
    (tmp_path / "generation_config.json").write_text(json.dumps({"temperature": -1}))
    with pytest.raises(InvalidCheckpoint, match="temperature is -1, expected a number from 0 to 100"):
        describe_model(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"top_k": 20}))
    assert describe_model(tmp_path).defaults.eos_token_ids == (2,)


def test_every_registered_architecture_reads_a_config(tmp_path: Path) -> None:
    for name in ARCHITECTURES:
        assert spec_of(tmp_path, architectures=[name]).architecture == name
