"""Checkpoints: one safetensors file, its metadata as JSON in the header, replaced atomically.

A crash leaves the previous checkpoint whole, because the new one is written beside it, synced and renamed.
Batches are a function of the step number, hence the step is the whole state of the data. No pickle is read or written.
"""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run has come."""

    model: str
    step: int
    tokens: int
    seconds: float
    seed: int


def save_checkpoint(path: Path, tensors: dict[str, Tensor], progress: Progress) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".new")
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        fresh,
        metadata={"progress": json.dumps(asdict(progress))},
    )
    with fresh.open("rb+") as file:
        os.fsync(file.fileno())
    fresh.replace(path)


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], Progress]:
    """Tensors and progress; raises ValueError if the file was not written by `save_checkpoint`."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        if "progress" not in metadata:
            raise ValueError(f"{path} has no progress record: it is not a checkpoint of this script")
        return {name: file.get_tensor(name) for name in file.keys()}, Progress(**json.loads(metadata["progress"]))  # noqa: SIM118
