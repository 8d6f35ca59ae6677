"""Every format of a checkpoint: what is loaded is what was written, whole and in ranks' shares.

Method: codes, scales and zero points are drawn, packed value by value by the test, loaded, dequantized and compared bit
for bit with the floats that they mean.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llmscale.errors import ConfigError, InvalidCheckpoint, LlmscaleError, UnsupportedModel
from llmscale.models import open_files
from llmscale.models.checkpoint import compute_dtype, open_checkpoint
from llmscale.models.loader import Weights, load_weights
from llmscale.models.registry import describe_model
from llmscale.models.shard import RankPlace, shard_model
from llmscale.models.spec import ModelSpec, ShardAxis, WeightSpec
from llmscale.quant.method import method_for
from llmscale.quant.weight import QuantizedWeight
from tests.models_support import write_config
from tests.quantized_checkpoints import FORMATS, TOKENS, compressed_config, rewrite_config, write_quantized_model

ORDERED = {"compressed_int4_ordered", "gptq_act_order"}


def dequantized(spec: ModelSpec, weights: Weights, weight: WeightSpec) -> Tensor:
    taken = weights.take(weight)
    if not isinstance(taken, QuantizedWeight):
        return taken
    assert spec.quantization is not None
    return method_for(spec.quantization.layout).dequantize(taken)


@pytest.mark.parametrize("name", FORMATS)
def test_a_checkpoint_means_what_was_packed(name: str, tmp_path: Path) -> None:
    dense = write_quantized_model(tmp_path, name)
    model = describe_model(tmp_path)
    weights = load_weights(model.folder, model.spec)
    for linear in model.spec.linears():
        expected = torch.cat([dense[part.name] for part in linear.weight.parts])
        assert torch.equal(dequantized(model.spec, weights, linear.weight), expected), linear.weight.name
    assert torch.equal(weights[model.spec.embedding], dense["model.embed_tokens.weight"])


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("name", sorted(FORMATS.keys() - ORDERED))
def test_ranks_hold_their_share_of_a_quantized_weight(name: str, ranks: int, tmp_path: Path) -> None:
    """With four ranks heads of 16 inputs divide groups of 32 and 64, which kernels refuse; the rest still holds."""
    dense = write_quantized_model(tmp_path, name, head_dim=32 if ranks == 4 else 16)
    model = describe_model(tmp_path)
    for rank in range(ranks):
        part = shard_model(model.spec, RankPlace(rank, ranks))
        weights = load_weights(model.folder, model.spec, part=part)
        for linear in part.spec.linears():
            expected = []
            for tensor in linear.weight.parts:
                whole, cut = dense[tensor.name], part.slices.get(tensor.name)
                expected.append(whole if cut is None else whole.narrow(cut.axis, cut.start, cut.stop - cut.start))
            assert torch.equal(dequantized(model.spec, weights, linear.weight), torch.cat(expected)), linear.weight.name


@pytest.mark.parametrize("name", ["compressed_int4_symmetric", "compressed_int4_per_channel"])
def test_a_cut_that_ends_within_a_group_has_whole_smaller_ones(name: str, tmp_path: Path) -> None:
    """One head of 96 inputs is a group of 64 and half of the next; the product takes groups of 32 then."""
    dense = write_quantized_model(tmp_path, name, head_dim=96)
    model = describe_model(tmp_path)
    for rank in range(4):
        part = shard_model(model.spec, RankPlace(rank, 4))
        output = part.spec.blocks[0].attention.output.weight
        weight = load_weights(model.folder, model.spec, part=part).take(output)
        assert isinstance(weight, QuantizedWeight)
        assert weight.scales.shape == (128, 96 // weight.group_size)
        assert model.spec.quantization is not None
        method = method_for(model.spec.quantization.layout)
        meant = dense[output.parts[0].name][:, 96 * rank : 96 * (rank + 1)]
        assert torch.equal(method.dequantize(weight), meant)
        result = method.prepare(weight, None, torch.float32).apply(torch.eye(96), torch.empty(96, 128))
        assert torch.allclose(result, meant.t(), rtol=0.01, atol=1e-4)


def test_inner_features_are_cut_at_groups(tmp_path: Path) -> None:
    """192 inner features are three groups of 64; two ranks get whole ones, not 96 each."""
    write_quantized_model(tmp_path, "compressed_int4_symmetric")
    spec = describe_model(tmp_path).spec
    sizes = [shard_model(spec, RankPlace(rank, 2)).spec.blocks[0].mlp.inner_size for rank in range(2)]
    assert sizes == [64, 128]
    assert [shard_model(spec, RankPlace(rank, 4)).spec.blocks[0].mlp.inner_size for rank in range(4)] == [
        32,
        64,
        32,
        64,
    ]


def test_a_cut_within_the_smallest_group_is_refused_with_its_pieces(tmp_path: Path) -> None:
    write_quantized_model(tmp_path, "gptq")
    model = describe_model(tmp_path)
    with pytest.raises(ConfigError, match=r"o_proj.*inputs 16 to 32 of 64 cut the groups of 32.* into pieces of 16"):
        load_weights(model.folder, model.spec, part=shard_model(model.spec, RankPlace(1, 4)))


@pytest.mark.parametrize("name", sorted(ORDERED))
def test_ordered_inputs_are_not_divided_among_ranks_but_among_stages(name: str, tmp_path: Path) -> None:
    dense = write_quantized_model(tmp_path, name, num_hidden_layers=2)
    model = describe_model(tmp_path)
    with pytest.raises(ConfigError, match=r"act-order.*Use one tensor-parallel rank"):
        load_weights(model.folder, model.spec, part=shard_model(model.spec, RankPlace(0, 2)))
    part = shard_model(model.spec, RankPlace(stage=1, stages=2))
    weights = load_weights(model.folder, model.spec, part=part)
    down = part.spec.blocks[0].mlp.down.weight
    assert torch.equal(dequantized(model.spec, weights, down), dense[down.parts[0].name])


def test_a_rank_touches_only_its_entries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_quantized_model(tmp_path, "awq")
    model = describe_model(tmp_path)
    read: dict[str, int] = {}
    original = open_files.OpenFiles.read

    def recording(self: open_files.OpenFiles, name: str, spans: tuple[open_files.Span, ...]) -> Tensor:
        tensor = original(self, name, spans)
        read[name] = read.get(name, 0) + tensor.numel()
        return tensor

    monkeypatch.setattr(open_files.OpenFiles, "read", recording)
    for rank in range(2):
        load_weights(model.folder, model.spec, part=shard_model(model.spec, RankPlace(rank, 2)))
    entries = open_checkpoint(model.folder).tensors
    for linear in model.spec.blocks[0].attention.qkv, model.spec.blocks[0].mlp.down:
        assert linear.weight.shard_axis is not ShardAxis.NONE
        for part in linear.weight.parts:
            for suffix in ("qweight", "qzeros", "scales"):
                name = part.name.removesuffix("weight") + suffix
                size = 1
                for length in entries[name].shape:
                    size *= length
                assert read[name] == size, name


def test_float16_beside_quantized_weights_becomes_bfloat16(tmp_path: Path) -> None:
    write_quantized_model(tmp_path, "awq")
    path = tmp_path / "model.safetensors"
    save_file({n: t.half() if t.dtype == torch.float32 else t for n, t in load_file(path).items()}, path)
    model = describe_model(tmp_path)
    checkpoint = open_checkpoint(model.folder)
    assert compute_dtype("auto", model.spec, checkpoint) == "bfloat16"
    assert compute_dtype("float32", model.spec, checkpoint) == "float32"


Change = Callable[[dict[str, Tensor]], None]
PREFIX = "model.layers.0.self_attn.q_proj"


def _drop(name: str) -> Change:
    return lambda tensors: (tensors.pop(name), None)[1]


def _put(name: str, make: Callable[[Tensor], Tensor]) -> Change:
    return lambda tensors: tensors.update({name: make(tensors[name])})


@pytest.mark.parametrize(
    ("form", "change", "error", "message"),
    [
        ("awq", _drop(f"{PREFIX}.scales"), InvalidCheckpoint, rf"'{PREFIX}.scales' is missing \(shape \[4, 64\]\)"),
        ("awq", _drop(f"{PREFIX}.qweight"), UnsupportedModel, "is quantized, but not all of"),
        (
            "awq",
            _put(f"{PREFIX}.qweight", lambda t: t[:-1]),
            InvalidCheckpoint,
            r"has shape \[127, 8\], expected \[128",
        ),
        ("awq", _put(f"{PREFIX}.qzeros", torch.Tensor.float), InvalidCheckpoint, "has dtype F32, expected one of I32"),
        (
            "awq",
            _put(f"{PREFIX}.scales", lambda t: t * torch.nan),
            InvalidCheckpoint,
            "q_proj.*a scale that is not a finite number",
        ),
        (
            "compressed_int4_symmetric",
            _put(f"{PREFIX}.weight_scale", lambda t: t * -torch.inf),
            InvalidCheckpoint,
            "q_proj.*a scale that is not a finite number",
        ),
        (
            "compressed_fp8_channel",
            _put(f"{PREFIX}.weight_scale", torch.neg),
            InvalidCheckpoint,
            "q_proj.*a scale that is negative or not a finite number",
        ),
        (
            "compressed_int8",
            _put(f"{PREFIX}.weight_scale", lambda t: t * torch.inf),
            InvalidCheckpoint,
            "q_proj.*a scale that is negative or not a finite number",
        ),
        (
            "gptq_act_order",
            _put(f"{PREFIX}.g_idx", torch.zeros_like),
            InvalidCheckpoint,
            "does not name each of its 4 groups 32 times",
        ),
        (
            "gptq_act_order",
            _put(f"{PREFIX}.g_idx", lambda t: t.flip(0)),
            UnsupportedModel,
            "order their input features differently",
        ),
        ("gptq", _put(f"{PREFIX}.bias", torch.ones_like), UnsupportedModel, "a bias that is not zero"),
        (
            "compressed_int4_symmetric",
            _put(f"{PREFIX}.weight_shape", lambda t: t + 1),
            InvalidCheckpoint,
            r"weight_shape says \[65, 129\], the model needs \[64, 128\]",
        ),
        ("fp8_blocks", _drop(f"{PREFIX}.weight_scale_inv"), InvalidCheckpoint, r"is missing \(shape \[1, 1\]\)"),
    ],
)
def test_a_malformed_tensor_is_refused_by_name(
    form: str, change: Change, error: type[LlmscaleError], message: str, tmp_path: Path
) -> None:
    write_quantized_model(tmp_path, form)
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "model.safetensors")
    model = describe_model(tmp_path)
    with pytest.raises(error, match=message):
        load_weights(model.folder, model.spec)


def _weights(**fields: Any) -> dict[str, Any]:
    return {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128} | fields


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ({"quant_method": "awq", "version": "gemv"}, UnsupportedModel, "only 'gemm' is implemented"),
        ({"quant_method": "awq", "bits": 8, "group_size": 64}, UnsupportedModel, "values have 8 bits; only 4"),
        (
            {"quant_method": "awq", "group_size": 48},
            UnsupportedModel,
            "group_size is 48; implemented are multiples of 32",
        ),
        ({"quant_method": "awq", "group_size": 1 << 40}, InvalidCheckpoint, "group_size is 1099511627776, expected"),
        ({"quant_method": "awq"}, InvalidCheckpoint, "no field 'group_size'"),
        ({"quant_method": "gptq", "bits": 3, "group_size": 64}, UnsupportedModel, "values have 3 bits"),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, UnsupportedModel, "'gptq_v2'"),
        ({"quant_method": "fp8", "fmt": "e5m2"}, UnsupportedModel, "only e4m3"),
        (
            {"quant_method": "fp8", "weight_block_size": [128]},
            InvalidCheckpoint,
            "expected 2 integers from 1 to 16,384",
        ),
        ({"quant_method": "fp8", "weight_block_size": [0, 128]}, InvalidCheckpoint, "expected 2 integers"),
        ({"quant_method": "x" * 1_000_000}, UnsupportedModel, "implemented are awq, compressed-tensors, fp8, gptq"),
        (
            compressed_config("pack-quantized", _weights(num_bits=8)),
            UnsupportedModel,
            "int weights of 8 bits with activ",
        ),
        (compressed_config("pack-quantized", _weights(), TOKENS), UnsupportedModel, "with 8-bit activations"),
        (compressed_config("marlin-24", _weights()), UnsupportedModel, "in format 'marlin-24' are not implemented"),
        (compressed_config("pack-quantized", _weights(group_size=0)), UnsupportedModel, "group_size is 0"),
        (compressed_config("pack-quantized", _weights(strategy="token")), UnsupportedModel, "strategy is 'token'"),
        (
            compressed_config("int-quantized", _weights(num_bits=8, strategy="channel"), TOKENS | {"dynamic": False}),
            UnsupportedModel,
            "only activations that are quantized per token",
        ),
        (
            compressed_config("int-quantized", _weights(num_bits=8, strategy="channel", symmetric=False), TOKENS),
            UnsupportedModel,
            "8-bit codes with zero points",
        ),
        (
            compressed_config("pack-quantized", _weights()) | {"kv_cache_scheme": {"num_bits": 8}},
            UnsupportedModel,
            "kv_cache_scheme",
        ),
        (
            compressed_config("pack-quantized", _weights()) | {"sparsity_config": {"format": "sparse-bitmask"}},
            UnsupportedModel,
            "sparse weights",
        ),
        ({"quant_method": "compressed-tensors", "config_groups": {}}, UnsupportedModel, "describes 0 kinds"),
        ({"quant_method": "compressed-tensors", "config_groups": [1]}, InvalidCheckpoint, "an object of objects"),
        (
            {"quant_method": "compressed-tensors", "config_groups": {str(n): {} for n in range(300)}},
            InvalidCheckpoint,
            "'300 objects', expected at most 256",
        ),
    ],
)
def test_a_config_that_is_not_implemented_is_refused_by_its_field(
    config: dict[str, Any], error: type[LlmscaleError], message: str, tmp_path: Path
) -> None:
    write_config(tmp_path, quantization_config=config)
    with pytest.raises(error, match=message) as caught:
        describe_model(tmp_path)
    assert len(str(caught.value)) < 600


def test_a_width_that_groups_do_not_divide_is_refused_by_name(tmp_path: Path) -> None:
    write_quantized_model(tmp_path, "awq")
    rewrite_config(tmp_path, quantization_config=FORMATS["awq"].config | {"group_size": 256})
    model = describe_model(tmp_path)
    with pytest.raises(InvalidCheckpoint, match=r"q_proj.weight' has 128 input features, which groups of 256"):
        load_weights(model.folder, model.spec)


def test_a_config_that_calls_a_dense_checkpoint_quantized_is_refused(tmp_path: Path) -> None:
    dense = write_quantized_model(tmp_path, "awq")
    save_file(dense, tmp_path / "model.safetensors")
    model = describe_model(tmp_path)
    with pytest.raises(InvalidCheckpoint, match="but no projection of the checkpoint is"):
        load_weights(model.folder, model.spec)
