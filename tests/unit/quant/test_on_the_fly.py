"""Dense checkpoints that are quantized while they are loaded, and copies that `llmscale quantize` writes."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from llmscale import machine
from llmscale.cli import app
from llmscale.config import QUANTIZATIONS, NodeSettings
from llmscale.embedded import embedded_model_path
from llmscale.errors import ConfigError, InvalidCheckpoint, UnsupportedModel
from llmscale.evaluation.executors import ModelChoice, NativeExecutor
from llmscale.models import quantization, quantizer
from llmscale.models.loader import Weights, load_weights
from llmscale.models.quantizer import layout_for, quantize_folder
from llmscale.models.registry import ModelDescription, describe_model
from llmscale.models.shard import RankPlace, shard_model
from llmscale.node.plan import plan_replica
from llmscale.quant.method import method_for
from llmscale.quant.weight import QuantizedWeight
from llmscale.worker.step import StepLimits
from tests.models_support import write_random_checkpoint
from tests.quantized_checkpoints import SHAPES, write_quantized_model


def loaded(folder: Path, name: str | None = None) -> tuple[ModelDescription, Weights]:
    model = describe_model(folder, name)
    return model, load_weights(model.folder, model.spec)


def test_settings_and_models_know_the_same_names() -> None:
    assert tuple(quantization.QUANTIZATIONS) == QUANTIZATIONS
    with pytest.raises(ConfigError, match="quantization is 'int3', it must be one of int8, int4"):
        NodeSettings(model="tiny-chat", listen="", quantization="int3")
    with pytest.raises(ConfigError, match="quantization is 'int3'"):
        describe_model(embedded_model_path("tiny-chat"), "int3")


def test_projections_shrink_and_everything_else_stays(tmp_path: Path) -> None:
    tensors = write_random_checkpoint(tmp_path, dtype=torch.bfloat16, **SHAPES)
    _, dense = loaded(tmp_path)
    for name, share in (("int8", 0.54), ("int4", 0.35), ("int4-64", 0.32)):
        model, weights = loaded(tmp_path, name)
        projections = {linear.weight.name for linear in model.spec.linears()}
        projections.remove(model.spec.head.weight.name)
        kept = [weight for weight in model.spec.weights() if weight.name not in projections]
        rest = sum(weights[weight].nbytes for weight in kept)
        assert weights.total_bytes - rest < share * (dense.total_bytes - rest), name
        assert torch.equal(weights[model.spec.head.weight], tensors["lm_head.weight"])
        assert weights.fingerprint == dense.fingerprint


def test_one_projection_at_a_time_is_dense(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_random_checkpoint(tmp_path, **(SHAPES | {"num_hidden_layers": 3}))
    model = describe_model(tmp_path, "int8")
    method = type(method_for(quantization.QUANTIZATIONS["int8"]()))
    shapes: list[tuple[int, ...]] = []
    original = method.quantize

    def recording(self: object, weight: torch.Tensor) -> QuantizedWeight:
        shapes.append(tuple(weight.shape))
        return original(self, weight)  # type: ignore[arg-type]  # the class that it was taken from

    monkeypatch.setattr(method, "quantize", recording)
    load_weights(model.folder, model.spec)
    assert sorted(shapes[:7]) == sorted(shapes[7:14]), "each layer in turn, part by part"
    assert len(shapes) == 21


def test_a_rank_quantizes_its_own_share(tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path, **SHAPES)
    model = describe_model(tmp_path, "int4")
    whole = load_weights(model.folder, model.spec)
    method = method_for(quantization.QUANTIZATIONS["int4"]())
    down = model.spec.blocks[0].mlp.down.weight
    halves = []
    for rank in range(2):
        part = shard_model(model.spec, RankPlace(rank, 2))
        taken = load_weights(model.folder, model.spec, part=part).take(part.spec.blocks[0].mlp.down.weight)
        assert isinstance(taken, QuantizedWeight)
        halves.append(method.dequantize(taken))
    taken = whole.take(down)
    assert isinstance(taken, QuantizedWeight)
    assert torch.equal(torch.cat(halves, dim=1), method.dequantize(taken)), "cuts lie between groups"


def test_a_width_that_groups_do_not_divide_is_refused_by_name(tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path)
    with pytest.raises(ConfigError, match=r"q_proj.weight': A weight has 24 input features, which groups of 32"):
        loaded(tmp_path, "int4")
    loaded(tmp_path, "int8")


def test_a_quantized_checkpoint_is_not_quantized_again(tmp_path: Path) -> None:
    write_quantized_model(tmp_path, "awq")
    assert describe_model(tmp_path, "int4").spec == describe_model(tmp_path).spec
    for name in ("int8", "int4-128"):
        with pytest.raises(ConfigError, match=r"the checkpoint is quantized already \(int4-g32, awq\)"):
            describe_model(tmp_path, name)
    with pytest.raises(UnsupportedModel, match=r"quantized already \(int4-g32\)"):
        quantize_folder(tmp_path, tmp_path / "again", layout_for("int8"))


def test_hosts_of_a_replica_must_agree_on_it() -> None:
    plans = [
        plan_replica(NodeSettings(model="tiny-chat-mini", listen="", quantization=name)) for name in (None, "int8")
    ]
    assert plans[0].configuration_digest != plans[1].configuration_digest
    assert plans[0].weights_digest == plans[1].weights_digest


@pytest.mark.parametrize(("method", "group"), [("int8", None), ("int4", 32), ("int4", None), ("fp8", None)])
def test_a_written_copy_is_loaded_as_it_was_rounded(method: str, group: int | None, tmp_path: Path) -> None:
    dense = write_random_checkpoint(tmp_path / "dense", dtype=torch.bfloat16, **(SHAPES | {"intermediate_size": 256}))
    layout = layout_for(method, group)
    rounding = method_for(layout)
    if group is None and method == "int4":
        with pytest.raises(ConfigError, match=r"o_proj.weight': A weight has 64 input features, which groups of 128"):
            quantize_folder(tmp_path / "dense", tmp_path / "copy", layout)
        assert not list(tmp_path.glob("*copy*")), "nothing half-written is left"
        return
    written = quantize_folder(tmp_path / "dense", tmp_path / "copy", layout)
    assert written.weights == 7
    assert written.after_bytes < written.before_bytes
    model, weights = loaded(tmp_path / "copy")
    assert model.spec.quantization is not None
    assert model.spec.quantization.layout == layout
    for linear in model.spec.blocks[0].attention.qkv, model.spec.blocks[0].mlp.down:
        taken = weights.take(linear.weight)
        assert isinstance(taken, QuantizedWeight)
        expected = torch.cat([rounding.dequantize(rounding.quantize(dense[p.name])) for p in linear.weight.parts])
        assert torch.equal(rounding.dequantize(taken), expected)
    copied = load_file(tmp_path / "copy" / "model.safetensors")
    assert torch.equal(copied["lm_head.weight"], dense["lm_head.weight"])


def test_a_large_copy_has_an_index_over_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_random_checkpoint(tmp_path / "dense", **SHAPES)
    monkeypatch.setattr(quantizer, "MAX_SHARD_BYTES", 40_000)
    quantize_folder(tmp_path / "dense", tmp_path / "copy", layout_for("int4", 32, symmetric=True))
    files = sorted(path.name for path in (tmp_path / "copy").glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    placement = json.loads((tmp_path / "copy" / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(placement.values()) == set(files)
    loaded(tmp_path / "copy")


def test_the_command_writes_a_model_that_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "small"
    words = ["quantize", "tiny-chat-mini", str(target), "--method", "int4", "--group-size", "64"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    assert "int4-g64" in result.output
    assert {"config.json", "tokenizer.json", "generation_config.json"} <= {path.name for path in target.iterdir()}
    assert stat.S_IMODE((target / "model.safetensors").stat().st_mode) == stat.S_IMODE(
        (target / "config.json").stat().st_mode
    )
    assert loaded(target)[0].spec.quantization is not None
    again = CliRunner().invoke(app, words)
    assert isinstance(again.exception, ConfigError)
    assert "exists; give a folder that does not" in str(again.exception)


@pytest.mark.parametrize(
    ("method", "group", "symmetric", "message"),
    [
        ("int3", None, False, "method is 'int3', it must be one of int8, int4, fp8"),
        ("int4", 48, False, "group size is 48, it must be one of 32, 64, 128"),
        ("int8", 32, False, "group size and symmetry are for int4"),
        ("fp8", None, True, "group size and symmetry are for int4"),
    ],
)
def test_what_cannot_be_written_is_refused(method: str, group: int | None, symmetric: bool, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        layout_for(method, group, symmetric=symmetric)


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_no_finite_number_is_refused_by_name_and_row(broken: float, tmp_path: Path) -> None:
    tensors = write_random_checkpoint(tmp_path, **SHAPES)
    name = "model.layers.0.mlp.down_proj.weight"
    tensors[name][5, 7] = broken
    save_file(tensors, tmp_path / "model.safetensors")
    for quantized in ("int8", "int4"):
        choice = ModelChoice(tmp_path, "float32", quantized, threads=1)
        said = rf"{tmp_path.name}.*row 5 of a weight of .* no finite number, which has no code"
        with pytest.raises(InvalidCheckpoint, match=said):
            NativeExecutor(choice, describe_model(tmp_path, quantized), StepLimits(8, 8, 64), 4)
        with pytest.raises(InvalidCheckpoint, match=rf"'{name}' holds what is no finite number"):
            quantize_folder(tmp_path, tmp_path / f"out-{quantized}", layout_for(quantized))
        assert not list(tmp_path.glob("*out*")), "nothing is left of the way"


def test_keys_and_values_as_bytes_need_room_for_bytes_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = embedded_model_path("tiny-chat-mini")
    room = plan_replica(NodeSettings(model=str(folder), listen="", dtype="float32", kv_dtype="int8")).block_bytes * 40
    monkeypatch.setattr(machine, "free_bytes", lambda: room)
    model, limits = describe_model(folder), StepLimits(8, 8, 64)
    NativeExecutor(ModelChoice(folder, "float32", threads=1, kv_dtype="int8"), model, limits, 40)
    with pytest.raises(MemoryError, match="are free; lower kv_cache_bytes"):
        NativeExecutor(ModelChoice(folder, "float32", threads=1), model, limits, 40)
