"""Imports a GGUF file: a model folder in safetensors with the same weights, which everything else then serves.

Projections of the blocks in Q4_0 keep their integers as groups of 32 with a zero point, wherever all parts of a fused
product are; everything else, the head too, is dequantized and floats stay as they are. One tensor is held at a time.
Values of block types are unpacked by the package `gguf`, after the header is proved. It does not know who wants the
folder.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from llmscale.errors import ConfigError, InvalidCheckpoint
from llmscale.extras import GGUF_PACKAGES, lacking
from llmscale.models.config import CONFIG_NAME, ConfigFields
from llmscale.models.fingerprint import TEXT_FILES
from llmscale.models.gguf_config import ROPE_FACTORS, GgufModel, read_gguf_model
from llmscale.models.gguf_header import GgufHeader, GgufTensor, read_gguf_header
from llmscale.models.gguf_tokenizer import tokenizer_files
from llmscale.models.new_folder import new_folder
from llmscale.models.quantizer import Shards, quantization_config
from llmscale.models.registry import spec_for
from llmscale.models.spec import ModelSpec
from llmscale.quant.layouts import compressed_int4
from llmscale.quant.method import method_for
from llmscale.quant.weight import QuantizedWeight, packed_nibbles

KEPT_TYPE = "Q4_0"
KEPT_GROUP = 32
FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
MAX_ROPE_FACTORS = 1_024


@dataclass(frozen=True, slots=True)
class Imported:
    """Tensors by what became of them, and bytes of the new files' tensors."""

    kept: int
    dequantized: int
    floats: int
    after_bytes: int

    def __str__(self) -> str:
        return (
            f"{self.kept:,} tensors keep their integers, {self.dequantized:,} are dequantized to bfloat16,"
            f" {self.floats:,} are floats as they were"
        )


def import_gguf(source: Path, target: Path, *, tokenizer: Path | None = None, keeps_integers: bool = True) -> Imported:
    """Writes `target`, a new folder. `tokenizer` is a folder whose tokenizer files are used instead of the file's own.

    Raises InvalidCheckpoint and UnsupportedModel for the file, InvalidTokenizer for its vocabulary, ConfigError for a
    target that exists or a package that is missing.
    """
    header = read_gguf_header(source)
    factors = _rope_factors(source, header)
    model = read_gguf_model(header, source.name, factors)
    spec = spec_for(ConfigFields(model.config, source.name))
    _match(source.name, spec, model, header)
    texts = None if tokenizer is not None else tokenizer_files(header.metadata, source.name)
    kept = _kept(spec, model, header) if keeps_integers else frozenset[str]()
    with new_folder(target) as making:
        imported = _write_weights(source, making, spec, model, header, kept)
        config = dict(model.config)
        if kept:
            layout = compressed_int4(KEPT_GROUP, symmetric=False)
            config["quantization_config"] = quantization_config(layout, _dense_modules(spec, kept))
        _write_json(making / CONFIG_NAME, config)
        for name, content in (texts or {}).items():
            _write_json(making / name, content)
        if tokenizer is not None:
            _copy_tokenizer(tokenizer, making)
        for weights in making.glob("*.safetensors"):
            # The library writes them for this user alone.
            shutil.copymode(making / CONFIG_NAME, weights)
    return imported


def _match(shown: str, spec: ModelSpec, model: GgufModel, header: GgufHeader) -> None:
    """Proves that the file holds exactly the spec's tensors in their shapes."""
    problems: list[str] = []
    expected: set[str] = set()
    for weight in spec.weights():
        for part in weight.parts:
            expected.add(part.name)
            entry = header.tensors.get(model.names.get(part.name, ""))
            if entry is None:
                problems.append(f"the tensor for {part.name!r} is missing")
            elif entry.shape != part.shape:
                problems.append(f"{entry.name!r} has shape {list(entry.shape)}, expected {list(part.shape)}")
    surplus = sorted(model.names.keys() - expected)
    problems += [f"{model.names[name]!r} is not part of {spec.architecture} as it is described" for name in surplus]
    if problems:
        raise InvalidCheckpoint(f"{shown}: {'; '.join(problems[:20])}. Download it again.")


def _kept(spec: ModelSpec, model: GgufModel, header: GgufHeader) -> frozenset[str]:
    """Parts of products whose integers can be kept: a product has quantized parts only, or none."""
    found: set[str] = set()
    for names in _products(spec):
        if all(header.tensors[model.names[name]].type.name == KEPT_TYPE for name in names):
            found.update(names)
    return frozenset(found)


def _products(spec: ModelSpec) -> list[list[str]]:
    """The names of the parts of each product of the blocks. vLLM has no integers of a head."""
    linears = [linear for linear in spec.linears() if linear.weight.name != spec.head.weight.name]
    return [[part.name for part in linear.weight.parts] for linear in linears]


def _dense_modules(spec: ModelSpec, kept: frozenset[str]) -> list[str]:
    """Modules of the blocks without integers; a reader that is not told looks for theirs."""
    return [name.removesuffix(".weight") for names in _products(spec) for name in names if name not in kept]


def _write_weights(
    source: Path, making: Path, spec: ModelSpec, model: GgufModel, header: GgufHeader, kept: frozenset[str]
) -> Imported:
    shards = Shards(making)
    counts = {"kept": 0, "dequantized": 0, "floats": 0}
    for weight in spec.weights():
        for part in weight.parts:
            entry = header.tensors[model.names[part.name]]
            order = _row_order(part.name, entry, model)
            if part.name in kept:
                counts["kept"] += 1
                shards.add(_kept_tensors(source, part.name, entry, order))
                continue
            counts["floats" if entry.type.name in FLOATS else "dequantized"] += 1
            values = _dense(source, entry)
            shards.add({part.name: values if order is None else values[order].contiguous()})
    shards.finish()
    return Imported(counts["kept"], counts["dequantized"], counts["floats"], shards.total_bytes)


def _row_order(name: str, entry: GgufTensor, model: GgufModel) -> Tensor | None:
    """Where each row of a checkpoint's tensor lies in the file: within a head, halves there are pairs here."""
    heads = model.permuted_heads.get(name)
    if heads is None:
        return None
    rows = torch.arange(entry.shape[0]).view(heads, entry.shape[0] // heads // 2, 2)
    return rows.transpose(1, 2).flatten()


def _raw(source: Path, entry: GgufTensor) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    """A copy of a tensor's bytes."""
    with source.open("rb") as file:
        file.seek(entry.begin)
        raw = file.read(entry.end - entry.begin)
    if len(raw) != entry.end - entry.begin:
        raise InvalidCheckpoint(f"{source.name!r} was cut off while it was read. Import it again.")
    return np.frombuffer(bytearray(raw), dtype=np.uint8)


def _dense(source: Path, entry: GgufTensor) -> Tensor:
    """Floats as they are; others dequantized in float32 and rounded to bfloat16."""
    raw = _raw(source, entry)
    if entry.type.name in FLOATS:
        return torch.from_numpy(raw).view(FLOATS[entry.type.name]).view(entry.shape)
    if (lack := lacking(GGUF_PACKAGES, "node", "gguf")) is not None:
        raise ConfigError(
            f"{entry.name!r} of {source.name!r} is stored as {entry.type.name}, which the package gguf unpacks, and"
            f" {lack}"
        )
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize

    rows = raw.reshape(-1, entry.shape[-1] // entry.type.elements * entry.type.block_bytes)
    # Scales that are no numbers are found below; numpy need not say so as well.
    with np.errstate(all="ignore"):
        values = torch.from_numpy(dequantize(rows, GGMLQuantizationType[entry.type.name]))
    if not bool(values.isfinite().all()):
        raise InvalidCheckpoint(f"{entry.name!r} of {source.name!r} has a value that is no number. Download it again.")
    return values.view(entry.shape).bfloat16()


def _kept_tensors(source: Path, name: str, entry: GgufTensor, order: Tensor | None) -> dict[str, Tensor]:
    """Q4_0 as codes with zero points, value for value.

    A block is `scale * (code - 8)` with a scale of either sign. A negative one becomes `-scale * ((15 - code) - 7)`,
    so scales are positive, as every reader of checkpoints wants them, and zero points are 8 or 7.
    """
    blocks = torch.from_numpy(_raw(source, entry)).view(entry.shape[0], -1, entry.type.block_bytes)
    scales = blocks[:, :, :2].contiguous().view(torch.float16).squeeze(2)
    if not bool(scales.isfinite().all()):
        raise InvalidCheckpoint(f"{entry.name!r} of {source.name!r} has a scale that is no number. Download it again.")
    nibbles = blocks[:, :, 2:]
    # The low halves of the bytes are the first 16 values of a block.
    codes = torch.cat((nibbles & 15, nibbles >> 4), dim=2)
    negative = scales < 0
    codes = torch.where(negative[:, :, None], 15 - codes, codes).flatten(1)
    zeros = torch.where(negative, 7, 8).to(torch.uint8)
    if order is not None:
        codes, zeros, scales = codes[order], zeros[order], scales[order]
    weight = QuantizedWeight(packed_nibbles(codes), scales.abs().float(), KEPT_GROUP, zeros)
    stored = method_for(compressed_int4(KEPT_GROUP, symmetric=False)).stored(weight)
    # As the file has them: bfloat16 would drop three of their bits.
    stored["weight_scale"] = scales.abs().contiguous()
    prefix = name.removesuffix("weight")
    return {prefix + suffix: value.contiguous() for suffix, value in stored.items()}


def _rope_factors(source: Path, header: GgufHeader) -> list[float] | None:
    entry = header.tensors.get(ROPE_FACTORS)
    if entry is None:
        return None
    if entry.type.name != "F32" or len(entry.shape) != 1 or entry.shape[0] > MAX_ROPE_FACTORS:
        raise InvalidCheckpoint(f"{source.name!r}: {ROPE_FACTORS} is not a list of up to {MAX_ROPE_FACTORS:,} numbers.")
    values: list[float] = _dense(source, entry).tolist()
    return values


def _copy_tokenizer(folder: Path, making: Path) -> None:
    if not (folder / TEXT_FILES[0]).is_file():
        raise ConfigError(f"{str(folder)!r} has no {TEXT_FILES[0]}; give the folder of the original model's tokenizer")
    for name in TEXT_FILES:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, making / name)


def _write_json(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
