"""Calibration of whole models: a block computes what transformers does, scales change nothing but rounding, and what is
written is nearer to the original than rounding to the nearest.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llmscale.calibration import folder as folder_module
from llmscale.calibration.block import CalibrationOptions, advance, split
from llmscale.calibration.dense_block import DenseBlock, HiddenBatch, Product
from llmscale.calibration.folder import quantize_calibrated
from llmscale.calibration.scaling import scale_block
from llmscale.calibration.statistics import SampledRows, chosen_rows
from llmscale.calibration.texts import TextLimits, calibration_texts
from llmscale.embedded import embedded_model_path
from llmscale.errors import ConfigError, UnsupportedModel
from llmscale.evaluation.executors import ModelChoice
from llmscale.evaluation.scorer import ScoredRequest, Scorer
from llmscale.layers.norm import rms_norm
from llmscale.layers.rotary import rope_table
from llmscale.models.loader import LoadOptions, load_weights
from llmscale.models.quantizer import layout_for, quantize_folder
from llmscale.models.registry import ModelDescription, describe_model
from llmscale.quant.method import gridded_method_for
from llmscale.tokenizer import Tokenizer
from tests.models_support import VOCABULARY, write_tiny_model

FAMILIES = ("llama_with_biases", "llama3_scaled_rope_tied", "mistral_with_window", "qwen2", "qwen3")


def sequences(count: int, seed: int = 0, vocabulary: int = VOCABULARY) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 60, (count,), generator=generator).tolist()
    return [torch.randint(vocabulary, (length,), generator=generator).tolist() for length in lengths]


def blocks_of(folder: Path) -> tuple[ModelDescription, list[DenseBlock], list[HiddenBatch]]:
    model = describe_model(folder)
    weights = load_weights(model.folder, model.spec, LoadOptions(dtype="float32"))
    held = {weight.name: weights[weight] for weight in model.spec.weights()}
    texts = sorted(sequences(5), key=len)
    longest = len(texts[-1])
    ids = torch.tensor([text + [0] * (longest - len(text)) for text in texts])
    batch = HiddenBatch(weights[model.spec.embedding][ids], tuple(map(len, texts)))
    made = []
    for spec in model.spec.blocks:
        rope = rope_table(spec.attention.rope, spec.attention.head_dim, longest, torch.device("cpu"))
        made.append(DenseBlock(spec, dict(held), rope))
    return model, made, [batch]


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_compute_what_transformers_does(family: str, tmp_path: Path) -> None:
    oracle = write_tiny_model(family, tmp_path)
    model, blocks, batches = blocks_of(tmp_path)
    for block in blocks:
        batches = advance(block, batches)
    norm = blocks[0].weights[model.spec.norm.weight.name]
    head = blocks[0].weights[model.spec.head.weight.name]
    logits = rms_norm(batches[0].hidden, norm, model.spec.norm.epsilon) @ head.t()
    for row, text in enumerate(sorted(sequences(5), key=len)):
        with torch.no_grad():
            expected = oracle(torch.tensor([text])).logits[0]
        assert torch.allclose(logits[row, : len(text)], expected, rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_scales_change_weights_and_not_what_a_block_computes(family: str, tmp_path: Path) -> None:
    write_tiny_model(family, tmp_path)
    _, blocks, batches = blocks_of(tmp_path)
    method = gridded_method_for(layout_for("int8"))
    assert method is not None
    block = blocks[1]
    norms = {norm.weight.name: torch.bfloat16 for norm in (block.spec.attention_norm, block.spec.mlp_norm)}
    for name in norms:
        block.weights[name] = block.weights[name].bfloat16().float()
    # A loud channel, so that there is something to scale.
    block.weights[block.spec.attention_norm.weight.name][3] *= 64
    before, old = advance(block, batches), dict(block.weights)
    chosen = chosen_rows(sum(batches[0].lengths), 0)
    sampled = {product: SampledRows(chosen) for product in Product}
    for product, inputs in block.all_inputs(batches[0].hidden).items():
        sampled[product].add(batches[0].tokens(inputs))
    assert scale_block(block, sampled, method, norms) >= 2
    assert any(not torch.equal(block.weights[name], old[name]) for name in old)
    after = advance(block, batches)
    text = batches[0].tokens(before[0].hidden)
    assert torch.allclose(batches[0].tokens(after[0].hidden), text, rtol=1e-3, atol=1e-3 * float(text.abs().max()))
    for name in norms:
        assert torch.equal(block.weights[name], block.weights[name].bfloat16().float()), "it is stored exactly"
    for linear in (block.spec.attention.qkv, block.spec.mlp.gate_up):
        if linear.bias is not None:
            exponents = (old[linear.bias.name] / block.weights[linear.bias.name]).log2()
            assert torch.equal(exponents, exponents.round())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_calibrated_family_is_served_and_nearer_than_rounding(family: str, tmp_path: Path) -> None:
    write_tiny_model(family, tmp_path / "dense")
    texts = sequences(40, seed=1)
    layout = layout_for("int8")
    made = quantize_calibrated(tmp_path / "dense", tmp_path / "made", layout, texts)
    assert made.tokens == sum(map(len, texts))
    quantize_folder(tmp_path / "dense", tmp_path / "rounded", layout)
    names = [set(load_file(tmp_path / name / "model.safetensors")) for name in ("made", "rounded")]
    assert names[0] == names[1]
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("made", "rounded")]
    assert configs[0] == configs[1]
    nats = [divergence(tmp_path / name, tmp_path / "dense", sequences(12, seed=2)) for name in ("made", "rounded")]
    # Random weights have no outliers to gain from; int8 must at least not lose.
    assert nats[0] < 1.2 * nats[1]


def divergence(folder: Path, dense: Path, texts: list[list[int]]) -> float:
    """Mean Kullback-Leibler divergence of a model from the dense one, in nats per token."""
    requests = [ScoredRequest(tuple(text), 1) for text in texts]
    one, other = (
        Scorer(ModelChoice(path, threads=1, dtype="float32")).log_probabilities(requests) for path in (folder, dense)
    )
    total, tokens = 0.0, 0
    for (_, _, rows), (_, _, exact) in zip(one, other, strict=True):
        total += float((exact.exp() * (exact - rows)).sum())
        tokens += rows.shape[0]
    return total / tokens


def test_calibrated_int4_is_nearer_to_the_embedded_model_and_the_same_twice(tmp_path: Path) -> None:
    """Questions of the training split calibrate, others grade; the loss is halved with a wide margin to spare."""
    source = embedded_model_path("tiny-chat-mini")
    tokenizer = Tokenizer(source)
    texts = calibration_texts("builtin", tokenizer, TextLimits(max_sequences=96), 0)
    layout = layout_for("int4", 64)
    for name in ("made", "again"):
        quantize_calibrated(source, tmp_path / name, layout, texts)
    made, again = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("made", "again"))
    assert made == again
    quantize_folder(source, tmp_path / "rounded", layout)
    graded = [list(text) for text in calibration_texts("builtin", tokenizer, TextLimits(max_sequences=48), 9)]
    calibrated, rounded = (divergence(tmp_path / name, source, graded) for name in ("made", "rounded"))
    assert calibrated < 0.6 * rounded


def test_steps_can_be_left_out(tmp_path: Path) -> None:
    source = embedded_model_path("tiny-chat-mini")
    texts = sequences(4, vocabulary=2_048)
    layout = layout_for("int4", 32)
    nothing = CalibrationOptions(scales=False, feedback=False)
    made = quantize_calibrated(source, tmp_path / "made", layout, texts, nothing)
    assert made.scaled == 0
    quantize_folder(source, tmp_path / "rounded", layout)
    stored = [load_file(tmp_path / name / "model.safetensors") for name in ("made", "rounded")]
    assert stored[0].keys() == stored[1].keys()
    assert all(torch.equal(stored[0][name], stored[1][name]) for name in stored[0])


def test_parts_of_a_fused_product_are_its_rows() -> None:
    model = describe_model(embedded_model_path("tiny-chat-mini"))
    spec = model.spec.blocks[0].attention.qkv.weight
    method = gridded_method_for(layout_for("int4", 32))
    assert method is not None
    whole = torch.randn(spec.shape, generator=torch.Generator().manual_seed(0))
    parts = split(method.quantize(whole), spec)
    assert list(parts) == [part.name for part in spec.parts]
    stacked = torch.cat([method.dequantize(part) for part in parts.values()])
    assert torch.equal(stacked, method.dequantize(method.quantize(whole)))


def test_what_cannot_be_calibrated_is_refused_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = embedded_model_path("tiny-chat-mini"), tmp_path / "made"
    int4, text = layout_for("int4", 32), [[1, 2, 3]]
    with pytest.raises(ConfigError, match="fp8 weights are not calibrated, only int8 and int4"):
        quantize_calibrated(source, target, layout_for("fp8"), text)
    with pytest.raises(ConfigError, match=r"mlp.down_proj.weight': A weight has 320 input .* groups of 128"):
        quantize_calibrated(source, target, layout_for("int4", 128), text)
    with pytest.raises(ConfigError, match="there are no calibration texts"):
        quantize_calibrated(source, target, int4, [[]])
    with pytest.raises(ConfigError, match="has id 9,999, the model's vocabulary is 2,048"):
        quantize_calibrated(source, target, int4, [[1, 9_999]])
    with pytest.raises(ConfigError, match="has 2,049 tokens, the model allows 2,048"):
        quantize_calibrated(source, target, int4, [[1] * 2_049])
    monkeypatch.setattr(folder_module, "MAX_HIDDEN_BYTES", 4_096)
    with pytest.raises(ConfigError, match=r"the limit is 4,096 \(MAX_HIDDEN_BYTES\)"):
        quantize_calibrated(source, target, int4, [[1] * 600])
    monkeypatch.undo()
    quantize_folder(source, tmp_path / "small", int4)
    with pytest.raises(UnsupportedModel, match="quantized already"):
        quantize_calibrated(tmp_path / "small", target, int4, text)
    assert not target.exists()
    assert not list(tmp_path.glob(".made*"))
