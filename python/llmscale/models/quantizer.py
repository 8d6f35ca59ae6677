"""Writes a quantized copy of a dense checkpoint: compressed-tensors in safetensors, readable by us and by vLLM.

Tensor by tensor: the projections of the blocks are rounded to the nearest, everything else is copied as it is, the head
and the embedding too. Costs one pass over the checkpoint and memory for one shard. The folder is complete when it
appears under its name. It does not know how weights are multiplied.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from llmscale.errors import ConfigError, InvalidCheckpoint, UnsupportedModel
from llmscale.models.checkpoint import (
    INDEX_NAME,
    SINGLE_NAME,
    Checkpoint,
    Progress,
    match_tensors,
    open_checkpoint,
)
from llmscale.models.config import CONFIG_NAME
from llmscale.models.new_folder import new_folder
from llmscale.models.open_files import OpenFiles
from llmscale.models.registry import ModelDescription, describe_model
from llmscale.models.tied_tables import refuse_different_tables
from llmscale.quant.layouts import Fp8Scales, Int4Layout, Layout, compressed_fp8, compressed_int4, compressed_int8
from llmscale.quant.method import QuantMethod, method_for
from llmscale.quant.weight import QuantizedWeight

MAX_SHARD_BYTES = 4 << 30
COPIED_SUFFIXES = (".json", ".jinja", ".txt", ".model", ".md")
METHODS = ("int8", "int4", "fp8")
GROUP_SIZES = (32, 64, 128)


@dataclass(frozen=True, slots=True)
class Written:
    """What came of it, in bytes of tensors."""

    before_bytes: int
    after_bytes: int
    weights: int
    """Projections that were quantized."""


def layout_for(method: str, group_size: int | None = None, *, symmetric: bool = False) -> Layout:
    """The layout that is written. `group_size` and `symmetric` are about int4 only. Raises ConfigError."""
    if method not in METHODS:
        raise ConfigError(f"method is {method!r}, it must be one of {', '.join(METHODS)}")
    if method != "int4":
        if group_size is not None or symmetric:
            raise ConfigError(f"method {method} has a scale per output; group size and symmetry are for int4")
        return compressed_int8() if method == "int8" else compressed_fp8(Fp8Scales.CHANNEL)
    size = GROUP_SIZES[-1] if group_size is None else group_size
    if size not in GROUP_SIZES:
        raise ConfigError(f"group size is {size}, it must be one of {', '.join(map(str, GROUP_SIZES))}")
    return compressed_int4(size, symmetric=symmetric)


def quantize_folder(source: Path, target: Path, layout: Layout, progress: Progress | None = None) -> Written:
    """Writes `target`, a new folder. Raises ModelError for a source that is no dense model, ConfigError for a target
    that exists or a width that groups do not divide."""
    model = dense_model(source)
    with new_folder(target) as making:
        written = _write_weights(model, making, method_for(layout), progress)
        copy_rest(model, making, layout)
    return written


def dense_model(source: Path) -> ModelDescription:
    """The model of a folder that may be quantized. Raises ModelError."""
    model = describe_model(source)
    if model.spec.quantization is not None:
        raise UnsupportedModel(
            f"The checkpoint in {str(source)!r} is quantized already ({model.spec.quantization.label}). Quantize the"
            " original one: every rounding of a rounding loses more."
        )
    return model


def projections(model: ModelDescription) -> set[str]:
    """Names of the tensors that are quantized: the blocks' projections, not the head's."""
    head = model.spec.head.weight.name
    return {part.name for linear in model.spec.linears() if linear.weight.name != head for part in linear.weight.parts}


def _write_weights(model: ModelDescription, making: Path, method: QuantMethod, progress: Progress | None) -> Written:
    checkpoint = open_checkpoint(model.folder)
    match_tensors(model.spec, checkpoint)
    refuse_different_tables(model.spec, checkpoint)
    chosen = projections(model)
    shards = Shards(making)
    with OpenFiles(checkpoint, list(checkpoint.tensors), progress) as files:
        for name in checkpoint.tensors:
            tensor = files.read(name, ())
            shards.add(_rounded(name, tensor, method) if name in chosen else {name: tensor.clone()})
    shards.finish()
    return Written(tensor_bytes(checkpoint), shards.total_bytes, len(chosen))


def tensor_bytes(checkpoint: Checkpoint) -> int:
    """Bytes of all tensors of a checkpoint."""
    return sum(entry.end - entry.begin for entry in checkpoint.tensors.values())


def _rounded(name: str, tensor: Tensor, method: QuantMethod) -> dict[str, Tensor]:
    require_finite(name, tensor)
    try:
        weight = method.quantize(tensor)
    except ConfigError as error:
        raise ConfigError(f"{name!r}: {error}") from error
    return stored_tensors(name, weight, method)


def require_finite(name: str, weight: Tensor) -> None:
    """Raises InvalidCheckpoint for a weight that has no codes."""
    if not torch.isfinite(weight).all():
        raise InvalidCheckpoint(
            f"{name!r} holds what is no finite number, which has no code. Download the checkpoint again."
        )


def stored_tensors(name: str, weight: QuantizedWeight, method: QuantMethod) -> dict[str, Tensor]:
    """The tensors of a weight by their names in a checkpoint."""
    prefix = name.removesuffix("weight")
    return {prefix + suffix: value.contiguous() for suffix, value in method.stored(weight).items()}


class Shards:
    """Files of bounded size, named as transformers names them once their number is known."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._held: dict[str, Tensor] = {}
        self._held_bytes = 0
        self._names: list[list[str]] = []
        self.total_bytes = 0

    def add(self, tensors: dict[str, Tensor]) -> None:
        """Takes the tensors of one weight."""
        size = sum(tensor.nbytes for tensor in tensors.values())
        if self._held and self._held_bytes + size > MAX_SHARD_BYTES:
            self._flush()
        self._held |= tensors
        self._held_bytes += size
        self.total_bytes += size

    def finish(self) -> None:
        """Writes what is left, and the index where there are several files."""
        self._flush()
        if len(self._names) == 1:
            self._part(0).rename(self._folder / SINGLE_NAME)
            return
        placement: dict[str, str] = {}
        for number, names in enumerate(self._names):
            file = f"model-{number + 1:05}-of-{len(self._names):05}.safetensors"
            self._part(number).rename(self._folder / file)
            placement |= dict.fromkeys(names, file)
        index = {"metadata": {"total_size": self.total_bytes}, "weight_map": placement}
        (self._folder / INDEX_NAME).write_text(json.dumps(index, indent=1), encoding="utf-8")

    def _flush(self) -> None:
        part = self._part(len(self._names))
        try:
            save_file(self._held, part, metadata={"format": "pt"})
        except SafetensorError as error:
            # Mostly a full disk, which the library tells in its own words.
            raise OSError(f"{part} cannot be written: {error}") from error
        self._names.append(list(self._held))
        self._held, self._held_bytes = {}, 0

    def _part(self, number: int) -> Path:
        return self._folder / f"part-{number}"


def copy_rest(model: ModelDescription, making: Path, layout: Layout) -> None:
    """Tokenizer, template and settings as they are; config.json with its quantization_config."""
    for name in sorted(name for suffix in COPIED_SUFFIXES for name in model.folder.names(suffix)):
        if name not in {CONFIG_NAME, INDEX_NAME}:
            shutil.copyfile(model.folder.file(name), making / name)
    config = model.folder.json_object(CONFIG_NAME) | {"quantization_config": quantization_config(layout)}
    (making / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for weights in making.glob("*.safetensors"):
        # The library writes them for this user alone.
        shutil.copymode(making / CONFIG_NAME, weights)


def quantization_config(layout: Layout, dense: Sequence[str] = ()) -> dict[str, Any]:
    """What compressed-tensors 0.17 and vLLM 0.32 read for a layout that we write. `dense` are the modules of the blocks
    that it does not hold for; the head is always dense, because vLLM does not look for integers there."""
    kind, bits = ("float", 8) if layout.method == "fp8" else ("int", 4 if layout.method == "int4" else 8)
    weights: dict[str, Any] = {"num_bits": bits, "type": kind, "dynamic": False, "observer": "minmax"}
    if isinstance(layout, Int4Layout):
        weights |= {"symmetric": layout.zeros is None, "strategy": "group", "group_size": layout.group_size}
    else:
        weights |= {"symmetric": True, "strategy": "channel", "group_size": None}
    activations = None
    if layout.method != "int4":
        activations = {"num_bits": 8, "type": kind, "symmetric": True, "dynamic": True, "strategy": "token"}
    return {
        "quant_method": "compressed-tensors",
        "format": {"int8": "int-quantized", "int4": "pack-quantized", "fp8": "float-quantized"}[layout.method],
        "quantization_status": "compressed",
        "ignore": ["lm_head", *dense],
        "kv_cache_scheme": None,
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": activations}},
    }
