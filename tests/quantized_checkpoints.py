"""Quantized checkpoints written value by value, each from known codes, scales and zero points.

Packing is spelled as loops over single values, straight from the formats' descriptions, so that it shares nothing with
the loader that it tests. `write_quantized_model` makes a Llama folder of a format and the same model in dense float32.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Generator, Tensor

from llmscale.models.registry import describe_model
from tests.models_support import random_tensors, write_config

# Heads of 32 and groups of 32 or 64 meet every kind of cut; all widths differ.
SHAPES: dict[str, object] = {
    "num_hidden_layers": 1,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 61,
}
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

Made = tuple[dict[str, Tensor], Tensor]
"""(tensors by suffix, the dense float32 weight that they mean)"""


@dataclass(frozen=True, slots=True)
class Format:
    """A format with its quantization_config and the tensors of one projection [out, in]."""

    config: dict[str, Any]
    make: Callable[[int, int, Generator], Made]


def _codes(generator: Generator, *shape: int, high: int = 16) -> list[list[int]]:
    values: list[list[int]] = torch.randint(high, shape, generator=generator).tolist()
    return values


def _scales(generator: Generator, *shape: int, dtype: torch.dtype) -> Tensor:
    return ((0.5 + torch.rand(*shape, generator=generator)) * 0.02).to(dtype)


def _signed_scales(generator: Generator, *shape: int, dtype: torch.dtype) -> Tensor:
    """Half of them negative, as AutoRound's of 4 bits are."""
    signs = torch.randint(2, shape, generator=generator) * 2 - 1
    return _scales(generator, *shape, dtype=dtype) * signs.to(dtype)


def _word(nibbles: list[int]) -> int:
    """Eight values in one int32, the first in the lowest bits, as Python's integers spell it."""
    word = sum(value << 4 * place for place, value in enumerate(nibbles))
    return word - (1 << 32) if word >= 1 << 31 else word


def _packed_rows(rows: list[list[int]], order: tuple[int, ...] = tuple(range(8))) -> Tensor:
    """Eight neighbours of a row in one word; nibble i is neighbour order[i]."""
    words = [
        [_word([(row + [0] * 7)[start + place] for place in order]) for start in range(0, len(row), 8)] for row in rows
    ]
    return torch.tensor(words, dtype=torch.int32)


def _less_ones(words: Tensor) -> Tensor:
    """Words less one in each of their values, borrows and all, as version 1 of GPTQ stores zero points."""
    rows = [[(word - 0x11111111) % (1 << 32) for word in row] for row in words.tolist()]
    return torch.tensor([[word - (1 << 32) * (word >= 1 << 31) for word in row] for row in rows], dtype=torch.int32)


def _turned(rows: list[list[int]]) -> list[list[int]]:
    return [list(column) for column in zip(*rows, strict=True)]


def _dense(codes: list[list[int]], zeros: list[list[int]], scales: Tensor, group_of: list[int]) -> Tensor:
    """codes [out][in], zeros [out][groups], scales [out, groups]."""
    numbers = scales.float().tolist()
    return torch.tensor(
        [
            [(code - zeros[row][group]) * numbers[row][group] for code, group in zip(line, group_of, strict=True)]
            for row, line in enumerate(codes)
        ],
        dtype=torch.float64,
    ).float()


def _compressed(group: int | None, *, symmetric: bool, shuffled: bool = False) -> Callable[[int, int, Generator], Made]:
    def make(out: int, inputs: int, generator: Generator) -> Made:
        size = inputs if group is None else group
        group_of = _group_index(inputs, size, shuffled=shuffled)
        codes = _codes(generator, out, inputs)
        zeros = [[8] * (inputs // size)] * out if symmetric else _codes(generator, out, inputs // size)
        scales = _signed_scales(generator, out, inputs // size, dtype=torch.bfloat16)
        tensors = {
            "weight_packed": _packed_rows(codes),
            "weight_scale": scales,
            "weight_shape": torch.tensor([out, inputs]),
        }
        if not symmetric:
            tensors["weight_zero_point"] = _packed_rows(_turned(zeros)).t().contiguous()
        if shuffled:
            tensors["weight_g_idx"] = torch.tensor(group_of, dtype=torch.int32)
        return tensors, _dense(codes, zeros, scales, group_of)

    return make


def _group_index(inputs: int, size: int, *, shuffled: bool) -> list[int]:
    """The group of each input. One order per width, since q, k and v are quantized on the same activations."""
    natural = [place // size for place in range(inputs)]
    if not shuffled:
        return natural
    order = torch.randperm(inputs, generator=Generator().manual_seed(inputs)).tolist()
    return [natural[place] for place in order]


def _awq(out: int, inputs: int, generator: Generator) -> Made:
    codes, zeros = _codes(generator, out, inputs), _codes(generator, out, inputs // 32)
    scales = _signed_scales(generator, out, inputs // 32, dtype=torch.float16)
    tensors = {
        "qweight": _packed_rows(_turned(codes), AWQ_ORDER),
        "qzeros": _packed_rows(_turned(zeros), AWQ_ORDER),
        "scales": scales.t().contiguous(),
    }
    return tensors, _dense(codes, zeros, scales, _group_index(inputs, 32, shuffled=False))


def _gptq(*, less_one: bool, shuffled: bool, group: int | None = 32) -> Callable[[int, int, Generator], Made]:
    def make(out: int, inputs: int, generator: Generator) -> Made:
        size = inputs if group is None else group
        group_of = _group_index(inputs, size, shuffled=shuffled)
        codes, zeros = _codes(generator, out, inputs), _codes(generator, out, inputs // size)
        packed_zeros = _packed_rows(_turned(zeros))
        scales = _signed_scales(generator, out, inputs // size, dtype=torch.float16)
        tensors = {
            "qweight": _packed_rows(codes).t().contiguous(),
            "qzeros": _less_ones(packed_zeros) if less_one else packed_zeros,
            "scales": scales.t().contiguous(),
            "g_idx": torch.tensor(group_of, dtype=torch.int32),
            "bias": torch.zeros(out, dtype=torch.float16),
        }
        return tensors, _dense(codes, zeros, scales, group_of)

    return make


def _int8(out: int, inputs: int, generator: Generator) -> Made:
    codes = torch.randint(-128, 128, (out, inputs), generator=generator)
    scales = _scales(generator, out, 1, dtype=torch.bfloat16) / 16
    return {"weight": codes.to(torch.int8), "weight_scale": scales}, codes.float() * scales.float()


def _fp8(scales: str, suffix: str) -> Callable[[int, int, Generator], Made]:
    def make(out: int, inputs: int, generator: Generator) -> Made:
        codes = torch.randn(out, inputs, generator=generator).to(torch.float8_e4m3fn)
        if scales == "block":
            stored = _scales(generator, -(-out // 128), -(-inputs // 128), dtype=torch.float32)
            rows, columns = torch.arange(out) // 128, torch.arange(inputs) // 128
            by_element = stored[rows[:, None], columns[None, :]]
        else:
            stored = _scales(generator, *((out, 1) if scales == "channel" else (1,)), dtype=torch.float32)
            by_element = stored.expand(out, inputs) if scales == "channel" else stored
        tensors = {"weight": codes, suffix: stored}
        if scales == "tensor":
            tensors["input_scale"] = torch.ones(1)
        return tensors, codes.float() * by_element

    return make


def compressed_config(form: str, weights: dict[str, Any], inputs: dict[str, Any] | None = None) -> dict[str, Any]:
    """A quantization_config of compressed-tensors with one group."""
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": inputs}},
    }


def _int4_config(group: int | None, *, symmetric: bool) -> dict[str, Any]:
    sizes = {"strategy": "channel"} if group is None else {"strategy": "group", "group_size": group}
    return compressed_config("pack-quantized", {"num_bits": 4, "type": "int", "symmetric": symmetric} | sizes)


TOKENS = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": True, "strategy": "token"}
FLOAT8 = {"num_bits": 8, "type": "float", "symmetric": True}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32}

FORMATS: dict[str, Format] = {
    "compressed_int4_symmetric": Format(_int4_config(64, symmetric=True), _compressed(64, symmetric=True)),
    "compressed_int4_with_zero_points": Format(_int4_config(32, symmetric=False), _compressed(32, symmetric=False)),
    "compressed_int4_per_channel": Format(_int4_config(None, symmetric=True), _compressed(None, symmetric=True)),
    "compressed_int4_ordered": Format(_int4_config(32, symmetric=True), _compressed(32, symmetric=True, shuffled=True)),
    "awq": Format({"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}, _awq),
    "gptq": Format(GPTQ, _gptq(less_one=True, shuffled=False)),
    "gptq_v2": Format(GPTQ | {"checkpoint_format": "gptq_v2"}, _gptq(less_one=False, shuffled=False)),
    "gptq_act_order": Format(GPTQ | {"desc_act": True}, _gptq(less_one=True, shuffled=True)),
    "gptq_one_group": Format(GPTQ | {"group_size": -1}, _gptq(less_one=True, shuffled=False, group=None)),
    "compressed_int8": Format(
        compressed_config("int-quantized", {"num_bits": 8, "type": "int", "strategy": "channel"}, TOKENS), _int8
    ),
    "fp8_blocks": Format({"quant_method": "fp8", "weight_block_size": [128, 128]}, _fp8("block", "weight_scale_inv")),
    "fp8_tensor": Format({"quant_method": "fp8", "activation_scheme": "static"}, _fp8("tensor", "weight_scale")),
    "compressed_fp8_channel": Format(
        compressed_config("float-quantized", FLOAT8 | {"strategy": "channel"}), _fp8("channel", "weight_scale")
    ),
    "compressed_fp8_tensor": Format(
        compressed_config("float-quantized", FLOAT8 | {"strategy": "tensor"}), _fp8("tensor", "weight_scale")
    ),
}


def write_quantized_model(folder: Path, name: str, **changes: object) -> dict[str, Tensor]:
    """Writes a format's checkpoint into `folder`; returns the dense float32 tensors that it means, by name."""
    form = FORMATS[name]
    write_config(folder, **(SHAPES | changes))
    generator = Generator().manual_seed(5)
    stored: dict[str, Tensor] = {}
    dense: dict[str, Tensor] = {}
    for tensor_name, value in random_tensors(describe_model(folder).spec).items():
        if tensor_name.split(".")[-2] in PROJECTIONS and tensor_name.endswith(".weight"):
            made, meant = form.make(*value.shape, generator)
            prefix = tensor_name.removesuffix("weight")
            biased = bool(changes.get("attention_bias")) and "self_attn" in tensor_name
            stored |= {prefix + suffix: tensor for suffix, tensor in made.items() if suffix != "bias" or not biased}
            dense[tensor_name] = meant
        else:
            # Small, so that activations neither vanish nor explode.
            small = value * 0.02 if "embed" in tensor_name or "lm_head" in tensor_name else 1 + 0.1 * value
            stored[tensor_name] = dense[tensor_name] = small
    write_config(folder, **(SHAPES | changes), quantization_config=form.config)
    save_file(stored, folder / "model.safetensors")
    return dense


def write_dense_model(folder: Path, dense: dict[str, Tensor], **changes: object) -> None:
    """The same model without quantization."""
    write_config(folder, **(SHAPES | changes))
    save_file(dense, folder / "model.safetensors")


def rewrite_config(folder: Path, **changes: object) -> None:
    """Changes fields of config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
