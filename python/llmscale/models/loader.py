"""Reads the weights of a checkpoint into the fused tensors of an executor.

Every tensor is copied once, from the mapped file into memory that the process owns, converted and fused on the way: a
file that is changed or truncated while it is served cannot crash the worker. Costs one pass over the checkpoint, and
memory for the weights in the compute dtype only. It is the only file of this package that imports torch. It does not
know how weights are used.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llmscale.errors import ConfigError, InvalidCheckpoint
from llmscale.models.checkpoint import Checkpoint, match_tensors, open_checkpoint
from llmscale.models.fingerprint import weights_fingerprint
from llmscale.models.folder import ModelFolder
from llmscale.models.shard import RankModel, TensorSlice, whole_model
from llmscale.models.spec import ModelSpec, WeightSpec

COMPUTE_DTYPES: dict[str, torch.dtype] = {"bfloat16": torch.bfloat16, "float32": torch.float32}

Progress = Callable[[int, int], None]
"""Called with checkpoint bytes read so far and in all."""


class Weights:
    """The weights of a model by their spec, all of one dtype on one device."""

    __slots__ = ("_tensors", "dtype", "fingerprint")

    def __init__(self, tensors: dict[str, Tensor], dtype: torch.dtype, fingerprint: str) -> None:
        self._tensors = tensors
        self.dtype = dtype
        self.fingerprint = fingerprint

    def __getitem__(self, weight: WeightSpec) -> Tensor:
        return self._tensors[weight.name]

    def take(self, weight: WeightSpec) -> Tensor:
        """Hands a weight over: it is not held here afterwards, so that whoever converts it can free the original."""
        return self._tensors.pop(weight.name)

    @property
    def total_bytes(self) -> int:
        """Bytes of the weights that are held."""
        return sum(tensor.nbytes for tensor in self._tensors.values())


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """How to load. `dtype` is "auto", "bfloat16" or "float32".

    "auto" follows the checkpoint: bfloat16 stays bfloat16, float32 stays float32. float16 becomes float32: CPUs have no
    fast float16 arithmetic, and bfloat16 would drop three of its ten mantissa bits unasked; ask for "bfloat16" to halve
    the memory. A checkpoint of several dtypes counts as the one with the most bytes.
    """

    dtype: str = "auto"
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    progress: Progress | None = None


def load_weights(
    folder: ModelFolder, spec: ModelSpec, options: LoadOptions | None = None, part: RankModel | None = None
) -> Weights:
    """Loads the weights of `spec` from a Hugging Face folder, or of one rank's part of it; other bytes are not read.

    Raises InvalidCheckpoint if anything is malformed, missing, surplus or mismatched; ConfigError for an unknown dtype.
    """
    options = options or LoadOptions()
    checkpoint = open_checkpoint(folder)
    match_tensors(spec, checkpoint)
    dtype = choose_dtype(options.dtype, checkpoint)
    tensors = _read(part or whole_model(spec), checkpoint, dtype, options)
    return Weights(tensors, dtype, weights_fingerprint(checkpoint))


def choose_dtype(requested: str, checkpoint: Checkpoint) -> torch.dtype:
    """The compute dtype; see `LoadOptions`. Raises ConfigError for a name that is not known."""
    if requested in COMPUTE_DTYPES:
        return COMPUTE_DTYPES[requested]
    if requested != "auto":
        raise ConfigError(f"dtype is {requested!r}, expected auto, {' or '.join(COMPUTE_DTYPES)}.")
    totals = checkpoint.dtype_bytes
    largest = max(sorted(totals), key=lambda name: totals[name])
    return torch.bfloat16 if largest == "BF16" else torch.float32


@dataclass(frozen=True, slots=True)
class _Placement:
    """Where a checkpoint tensor goes: which weight, the first row of its part, and what of the tensor is read."""

    weight: WeightSpec
    first_row: int
    taken: TensorSlice | None

    def read(self, file: Any, name: str) -> Tensor:
        if self.taken is None:
            tensor: Tensor = file.get_tensor(name)
        elif self.taken.axis == 0:
            tensor = file.get_slice(name)[self.taken.start : self.taken.stop]
        else:
            tensor = file.get_slice(name)[:, self.taken.start : self.taken.stop]
        return tensor


def _read(part: RankModel, checkpoint: Checkpoint, dtype: torch.dtype, options: LoadOptions) -> dict[str, Tensor]:
    spec = part.spec
    placements: dict[str, _Placement] = {}
    tensors: dict[str, Tensor] = {}
    for weight in spec.weights():
        tensors[weight.name] = torch.empty(weight.shape, dtype=dtype, device=options.device)
        row = 0
        for tensor in weight.parts:
            placements[tensor.name] = _Placement(weight, row, part.slices.get(tensor.name))
            row += tensor.shape[0]
    embedding_name = spec.embedding.parts[0].name
    tied_name = spec.head.tied_name
    if tied_name is not None and embedding_name not in checkpoint.tensors and embedding_name in placements:
        placements[tied_name] = placements.pop(embedding_name)
        tied_name = None
    total_bytes = sum(entry.end - entry.begin for entry in checkpoint.tensors.values())
    done_bytes = 0
    for file_name, path in checkpoint.files.items():
        entries = [entry for entry in checkpoint.tensors.values() if entry.file == file_name]
        try:
            with safe_open(str(path), framework="pt", device="cpu") as file:
                for entry in entries:
                    if entry.name in placements:
                        placement = placements[entry.name]
                        _place(placement, placement.read(file, entry.name), tensors)
                    done_bytes += entry.end - entry.begin
                    if options.progress is not None:
                        options.progress(done_bytes, total_bytes)
        except SafetensorError as error:
            raise InvalidCheckpoint(f"{file_name!r} cannot be read: {error}.") from error
    if tied_name is not None and tied_name in checkpoint.tensors:
        _check_tied(checkpoint, embedding_name, tied_name)
    return tensors


def _place(placement: _Placement, source: Tensor, tensors: dict[str, Tensor]) -> None:
    target = tensors[placement.weight.name]
    rows = target.narrow(0, placement.first_row, source.shape[0])
    if rows.shape != source.shape:
        raise InvalidCheckpoint(f"The part of {placement.weight.name!r} changed while it was read. Load it again.")
    rows.copy_(source)


def _check_tied(checkpoint: Checkpoint, embedding_name: str, head_name: str) -> None:
    """A tied checkpoint that stores both tables must store the same twice.

    Releases of transformers disagree on what two different tables mean (4 ties regardless, 5 does not tie), so neither
    is right.
    """
    tables = []
    for name in (embedding_name, head_name):
        with safe_open(str(checkpoint.files[checkpoint.tensors[name].file]), framework="pt", device="cpu") as file:
            tables.append(file.get_tensor(name))
    if not torch.equal(tables[0], tables[1].to(tables[0].dtype)):
        raise InvalidCheckpoint(
            f"config.json ties the head to the embedding, but {head_name!r} and {embedding_name!r} differ. Set "
            "tie_word_embeddings to false in config.json, or remove the one that is wrong."
        )
