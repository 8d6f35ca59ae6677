"""Loading: what ends up in the fused weights, and every way in which a folder may be wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from llmscale.errors import ConfigError, InvalidCheckpoint, UnsupportedModel
from llmscale.models.checkpoint import open_checkpoint
from llmscale.models.fingerprint import weights_fingerprint
from llmscale.models.folder import ModelFolder
from llmscale.models.loader import LoadOptions, Weights, load_weights
from llmscale.models.registry import describe_model
from tests.models_support import write_config, write_random_checkpoint

INDEX = "model.safetensors.index.json"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def load(folder: Path, options: LoadOptions | None = None) -> Weights:
    model = describe_model(folder)
    return load_weights(model.folder, model.spec, options)


def refused(folder: Path, message: str) -> str:
    with pytest.raises(InvalidCheckpoint, match=message) as caught:
        load(folder)
    return str(caught.value)


def rewrite(folder: Path, tensors: dict[str, Tensor]) -> None:
    save_file(tensors, folder / "model.safetensors")


def shard(folder: Path, tensors: dict[str, Tensor], shards: int = 3) -> dict[str, str]:
    """Spreads the tensors over shards, writes the index and removes the single file; returns the weight map."""
    (folder / "model.safetensors").unlink(missing_ok=True)
    placement = {name: f"model-{number % shards}.safetensors" for number, name in enumerate(tensors)}
    for file in set(placement.values()):
        save_file({name: tensors[name] for name in tensors if placement[name] == file}, folder / file)
    write_index(folder, placement)
    return placement


def write_index(folder: Path, placement: dict[str, str]) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": placement}))


def test_fused_weights_hold_their_parts_in_order(tmp_path: Path) -> None:
    tensors = write_random_checkpoint(tmp_path, attention_bias=True)
    weights, spec = load(tmp_path), describe_model(tmp_path).spec
    block = spec.blocks[1]
    prefix = "model.layers.1.self_attn"
    for weight, kind in ((block.attention.qkv.weight, "weight"), (block.attention.qkv.bias, "bias")):
        assert weight is not None
        parts = [tensors[f"{prefix}.{part}_proj.{kind}"] for part in "qkv"]
        assert torch.equal(weights[weight], torch.cat(parts))
    assert torch.equal(weights[spec.head.weight], tensors[HEAD])
    assert torch.equal(weights[spec.norm.weight], tensors["model.norm.weight"])
    assert weights.total_bytes == spec.parameters * 4


def test_shards_load_like_a_single_file_and_have_its_fingerprint(tmp_path: Path) -> None:
    tensors = write_random_checkpoint(tmp_path)
    single = load(tmp_path)
    shard(tmp_path, tensors)
    sharded, spec = load(tmp_path), describe_model(tmp_path).spec
    assert all(torch.equal(single[weight], sharded[weight]) for weight in spec.weights())
    assert sharded.fingerprint == single.fingerprint


@pytest.mark.parametrize(
    ("device", "stored", "requested", "expected"),
    [
        ("cpu", torch.bfloat16, "auto", torch.bfloat16),
        ("cpu", torch.float32, "auto", torch.float32),
        ("cpu", torch.float16, "auto", torch.float32),
        ("cpu", torch.float16, "bfloat16", torch.bfloat16),
        ("cpu", torch.float32, "bfloat16", torch.bfloat16),
        ("cpu", torch.bfloat16, "float32", torch.float32),
        # float16 becomes bfloat16 on devices apart, where float32 is slow.
        ("meta", torch.float16, "auto", torch.bfloat16),
        ("meta", torch.float16, "float32", torch.float32),
        ("meta", torch.bfloat16, "auto", torch.bfloat16),
        ("meta", torch.float32, "auto", torch.float32),
    ],
)
def test_dtypes_are_converted_with_one_rounding(
    tmp_path: Path, device: str, stored: torch.dtype, requested: str, expected: torch.dtype
) -> None:
    tensors = write_random_checkpoint(tmp_path, dtype=stored)
    weights = load(tmp_path, LoadOptions(dtype=requested, device=torch.device(device)))
    assert weights.dtype == expected
    if device == "cpu":
        assert torch.equal(weights[describe_model(tmp_path).spec.embedding], tensors[EMBEDDING].to(expected))


def test_a_few_float32_norms_do_not_change_the_dtype_of_a_bfloat16_checkpoint(tmp_path: Path) -> None:
    tensors = write_random_checkpoint(tmp_path, dtype=torch.bfloat16)
    rewrite(tmp_path, {name: value.float() if "norm" in name else value for name, value in tensors.items()})
    assert load(tmp_path).dtype == torch.bfloat16


def test_an_unknown_dtype_is_refused(tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path)
    with pytest.raises(ConfigError, match="dtype is 'float8', expected auto, bfloat16 or float32"):
        load(tmp_path, LoadOptions(dtype="float8"))


def test_weights_do_not_depend_on_the_file_after_loading(tmp_path: Path) -> None:
    tensors = write_random_checkpoint(tmp_path)
    weights, spec = load(tmp_path), describe_model(tmp_path).spec
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.truncate(16)
    assert torch.equal(weights[spec.embedding], tensors[EMBEDDING])


def test_progress_ends_with_all_bytes(tmp_path: Path) -> None:
    tensors = write_random_checkpoint(tmp_path)
    shard(tmp_path, tensors)
    calls: list[tuple[int, int]] = []
    load(tmp_path, LoadOptions(progress=lambda done, total: calls.append((done, total))))
    total = sum(tensor.nbytes for tensor in tensors.values())
    assert calls[-1] == (total, total)
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)
    assert len(calls) == len(tensors)


@pytest.mark.parametrize("stored", [(EMBEDDING,), (HEAD,), (EMBEDDING, HEAD)])
def test_a_tied_table_may_be_stored_under_either_name_or_both(tmp_path: Path, stored: tuple[str, ...]) -> None:
    tensors = write_random_checkpoint(tmp_path, tie_word_embeddings=True)
    table = tensors.pop(EMBEDDING)
    rewrite(tmp_path, tensors | {name: table.clone() for name in stored})
    weights, spec = load(tmp_path), describe_model(tmp_path).spec
    assert torch.equal(weights[spec.embedding], table)
    assert weights[spec.head.weight].data_ptr() == weights[spec.embedding].data_ptr()


def test_a_tied_checkpoint_without_any_table_misses_it(tmp_path: Path) -> None:
    tensors = write_random_checkpoint(tmp_path, tie_word_embeddings=True)
    del tensors[EMBEDDING]
    rewrite(tmp_path, tensors)
    refused(tmp_path, "'model.embed_tokens.weight' is missing")


def test_an_untied_checkpoint_needs_its_head(tmp_path: Path) -> None:
    tensors = write_random_checkpoint(tmp_path)
    del tensors[HEAD]
    rewrite(tmp_path, tensors)
    refused(tmp_path, r"'lm_head.weight' is missing \(shape \[53, 24\]\)")


def test_missing_surplus_and_mismatched_tensors_are_named_together(tmp_path: Path) -> None:
    tensors = write_random_checkpoint(tmp_path)
    del tensors["model.norm.weight"]
    tensors["model.layers.0.mlp.down_proj.weight"] = torch.zeros(40, 24)
    tensors["model.layers.2.mlp.down_proj.weight"] = torch.zeros(24, 40)
    tensors["model.layers.1.input_layernorm.weight"] = torch.zeros(24, dtype=torch.int32)
    rewrite(tmp_path, tensors)
    message = refused(tmp_path, "does not fit LlamaForCausalLM")
    assert "'model.norm.weight' is missing (shape [24])" in message
    assert "'model.layers.0.mlp.down_proj.weight' has shape [40, 24], expected [24, 40]" in message
    assert "'model.layers.2.mlp.down_proj.weight' is not part of LlamaForCausalLM" in message
    assert "'model.layers.1.input_layernorm.weight' has dtype I32, expected one of BF16, F16, F32" in message


def test_at_most_twenty_problems_are_named(tmp_path: Path) -> None:
    tensors = write_random_checkpoint(tmp_path)
    rewrite(tmp_path, tensors | {f"surplus.{number:03}": torch.zeros(1) for number in range(50)})
    message = refused(tmp_path, "and 30 more")
    assert "'surplus.019'" in message
    assert "'surplus.020'" not in message


def test_frequencies_that_old_releases_stored_are_ignored(tmp_path: Path) -> None:
    tensors = write_random_checkpoint(tmp_path)
    rewrite(tmp_path, tensors | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)})
    assert load(tmp_path).dtype == torch.float32
    rewrite(tmp_path, tensors | {"model.layers.2.self_attn.rotary_emb.inv_freq": torch.zeros(4)})
    refused(tmp_path, "is not part of")


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path)
    path = tmp_path / "model.safetensors"
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 1)
    refused(tmp_path, "is truncated")


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    tensors = write_random_checkpoint(tmp_path)
    placement = shard(tmp_path, tensors, shards=2)
    second = {name: tensors[name] for name in tensors if placement[name] == "model-1.safetensors"}
    save_file(second | {EMBEDDING: tensors[EMBEDDING]}, tmp_path / "model-1.safetensors")
    refused(tmp_path, "'model.embed_tokens.weight' is in 'model-0.safetensors' and in 'model-1.safetensors'")


def test_an_index_that_contradicts_its_shards_is_refused(tmp_path: Path) -> None:
    tensors = write_random_checkpoint(tmp_path)
    placement = shard(tmp_path, tensors, shards=2)
    write_index(tmp_path, placement | {EMBEDDING: "model-1.safetensors"})
    refused(tmp_path, "is in 'model-0.safetensors', the index says 'model-1.safetensors'")
    write_index(tmp_path, placement | {"model.extra": "model-1.safetensors"})
    refused(tmp_path, "'model.extra' is missing from 'model-1.safetensors'")
    write_index(tmp_path, {name: file for name, file in placement.items() if name != EMBEDDING})
    refused(tmp_path, "'model.embed_tokens.weight' in 'model-0.safetensors' is not in the index")


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("../outside.safetensors", "not a plain name"),
        ("/tmp/outside.safetensors", "not a plain name"),
        ("sub/outside.safetensors", "not a plain name"),
        ("pytorch_model.bin", "not a .safetensors file"),
        ("absent.safetensors", "'absent.safetensors' is missing"),
    ],
)
def test_an_index_cannot_lead_out_of_the_folder(tmp_path: Path, file: str, message: str) -> None:
    tensors = write_random_checkpoint(tmp_path / "model")
    save_file(tensors, tmp_path / "outside.safetensors")
    (tmp_path / "model" / "model.safetensors").unlink()
    write_index(tmp_path / "model", dict.fromkeys(tensors, file))
    refused(tmp_path / "model", message)


@pytest.mark.parametrize("content", [{}, {"weight_map": {}}, {"weight_map": []}, {"weight_map": {"a": 1}}])
def test_a_malformed_index_is_refused(tmp_path: Path, content: object) -> None:
    write_config(tmp_path)
    (tmp_path / INDEX).write_text(json.dumps(content))
    refused(tmp_path, "weight_map|not a .safetensors file")


def test_more_shards_than_the_limit_are_refused_before_one_is_opened(tmp_path: Path) -> None:
    write_config(tmp_path)
    write_index(tmp_path, {f"tensor.{number}": f"{number}.safetensors" for number in range(4_097)})
    refused(tmp_path, "4,097 shards, the limit is 4,096")


def test_pickle_files_are_refused_with_advice_and_never_opened(tmp_path: Path) -> None:
    write_config(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n")
    with pytest.raises(UnsupportedModel, match=r"pickle files such as 'pytorch_model.bin'.*safetensors"):
        load(tmp_path)


def test_a_folder_without_weights_says_so(tmp_path: Path) -> None:
    write_config(tmp_path)
    refused(tmp_path, "Download the weights as well")
    (tmp_path / "model-q4.gguf").write_bytes(b"GGUF")
    with pytest.raises(UnsupportedModel, match="GGUF files are not read"):
        load(tmp_path)


def test_a_fingerprint_tells_other_weights_dtypes_and_names_apart(tmp_path: Path) -> None:
    tensors = write_random_checkpoint(tmp_path)

    def fingerprint(changed: dict[str, Tensor]) -> str:
        rewrite(tmp_path, changed)
        return weights_fingerprint(open_checkpoint(ModelFolder(tmp_path)))

    original = fingerprint(tensors)
    assert original.startswith("sampled-sha256-1:")
    assert fingerprint(dict(reversed(tensors.items()))) == original
    assert fingerprint(tensors | {EMBEDDING: tensors[EMBEDDING] + 1}) != original
    assert fingerprint({name: tensor.half() for name, tensor in tensors.items()}) != original
    renamed = dict(tensors)
    renamed["model.other.weight"] = renamed.pop("model.norm.weight")
    assert fingerprint(renamed) != original


def test_a_fingerprint_samples_the_first_and_last_bytes_of_a_large_tensor(tmp_path: Path) -> None:
    def fingerprint(changed_position: int | None) -> str:
        table = torch.zeros(1 << 18)
        if changed_position is not None:
            table[changed_position] = 1
        save_file({"a": table}, tmp_path / "model.safetensors")
        return weights_fingerprint(open_checkpoint(ModelFolder(tmp_path)))

    assert len({fingerprint(position) for position in (None, 0, -1)}) == 3
