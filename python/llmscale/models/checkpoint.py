"""Finds the safetensors files of a folder and proves that they hold exactly the tensors of a spec.

Owns the list of tensors by name: one file, or the shards of `model.safetensors.index.json`, whose map must agree with
what the shards hold. Every missing, surplus or mismatched tensor is fatal, and up to twenty are named at once. Reads
headers only, O(n log n) in the number of tensors. It does not know torch and reads no weight.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path

from llmscale.errors import ConfigError, InvalidCheckpoint, UnsupportedModel
from llmscale.models.folder import ModelFolder
from llmscale.models.safetensors_header import TensorEntry, read_header
from llmscale.models.spec import ModelSpec, TensorSpec
from llmscale.models.stored import StoredPart, stored_weights

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
MAX_SHARDS = 4_096
MAX_NAMED_PROBLEMS = 20
WEIGHT_DTYPES = ("BF16", "F16", "F32")
COMPUTE_DTYPES = ("bfloat16", "float32")

Progress = Callable[[int, int], None]
"""Called with bytes of weights that have been read so far, and of all that will be."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The files of a checkpoint by shown name, and every tensor in them by name."""

    files: dict[str, Path]
    tensors: dict[str, TensorEntry]

    @property
    def dtype_bytes(self) -> dict[str, int]:
        """Bytes per dtype name, so that a caller may choose the compute dtype."""
        totals: dict[str, int] = {}
        for entry in self.tensors.values():
            totals[entry.dtype] = totals.get(entry.dtype, 0) + entry.end - entry.begin
        return totals


def open_checkpoint(folder: ModelFolder) -> Checkpoint:
    """Reads and proves every header. A single file wins over an index, as in transformers.

    Raises InvalidCheckpoint for malformed files, a tensor in two shards, or an index that contradicts its shards;
    UnsupportedModel for a folder that has weights in other formats only.
    """
    if folder.has(SINGLE_NAME):
        placement = None
        names = [SINGLE_NAME]
    elif folder.has(INDEX_NAME):
        placement = _read_index(folder)
        names = sorted(set(placement.values()))
    else:
        raise _no_weights(folder)
    files = {name: folder.file(name) for name in names}
    tensors: dict[str, TensorEntry] = {}
    problems: list[str] = []
    for name, path in files.items():
        for entry in read_header(path, name):
            first = tensors.setdefault(entry.name, entry)
            if first is not entry:
                problems.append(f"{entry.name!r} is in {first.file!r} and in {name!r}")
    if placement is not None:
        problems.extend(_compare_index(placement, tensors))
    raise_problems(INDEX_NAME if placement is not None else SINGLE_NAME, problems)
    return Checkpoint(files, tensors)


def match_tensors(spec: ModelSpec, checkpoint: Checkpoint) -> None:
    """Proves that the checkpoint holds the spec's tensors in their shapes and loadable dtypes, and nothing else.

    A tied table may be stored under the embedding's name, the head's, or both. Quantized weights are proved by their
    layout. Raises InvalidCheckpoint that names up to twenty problems; UnsupportedModel for mixtures within a product.
    """
    problems: list[str] = []
    expected: set[str] = set(spec.ignored_tensors)
    stored = stored_weights(spec, checkpoint.tensors)
    for parts in stored.values():
        for stored_part in parts:
            expected.update(stored_part.names)
            problems.extend(_stored_problems(stored_part, checkpoint))
    for weight in spec.weights():
        if weight.name in stored:
            continue
        for part in weight.parts:
            expected.add(part.name)
            if part.name in checkpoint.tensors:
                problems.extend(_mismatch(part, checkpoint.tensors[part.name]))
            elif part.name != spec.embedding.parts[0].name or spec.head.tied_name not in checkpoint.tensors:
                problems.append(f"{part.name!r} is missing (shape {list(part.shape)})")
    if spec.head.tied_name is not None:
        expected.add(spec.head.tied_name)
        if spec.head.tied_name in checkpoint.tensors:
            part = TensorSpec(spec.head.tied_name, spec.embedding.shape)
            problems.extend(_mismatch(part, checkpoint.tensors[part.name]))
    problems.extend(
        f"{name!r} is not part of {spec.architecture}" for name in sorted(checkpoint.tensors.keys() - expected)
    )
    raise_problems(f"The checkpoint does not fit {spec.architecture} as its config describes it", problems)


def compute_dtype(requested: str, spec: ModelSpec, checkpoint: Checkpoint, device: str = "cpu") -> str:
    """The dtype of activations and dense weights: "bfloat16" or "float32". "auto" follows the checkpoint's floats.

    bfloat16 stays bfloat16, float32 stays float32. float16 becomes float32 on CPUs: they have no fast float16
    arithmetic, and bfloat16 would drop three of its ten mantissa bits unasked. Beside quantized weights it becomes
    bfloat16, because their codes have fewer bits than that, and on other devices, where float32 is twice the memory and
    a small part of the speed. Of several dtypes the one with the most bytes counts. Raises ConfigError.
    """
    if requested in COMPUTE_DTYPES:
        return requested
    if requested != "auto":
        raise ConfigError(f"dtype is {requested!r}, expected auto, {' or '.join(COMPUTE_DTYPES)}.")
    totals = {name: count for name, count in checkpoint.dtype_bytes.items() if name in WEIGHT_DTYPES}
    largest = max(sorted(totals), key=lambda name: totals[name], default="BF16")
    halves = {"BF16", "F16"} if spec.quantization is not None or device != "cpu" else {"BF16"}
    return "bfloat16" if largest in halves else "float32"


def raise_problems(subject: str, problems: list[str]) -> None:
    """Raises InvalidCheckpoint with the first twenty problems, if there are any."""
    if not problems:
        return
    named = "; ".join(problems[:MAX_NAMED_PROBLEMS])
    rest = len(problems) - MAX_NAMED_PROBLEMS
    more = f"; and {rest:,} more" if rest > 0 else ""
    raise InvalidCheckpoint(f"{subject}: {named}{more}.")


def _mismatch(part: TensorSpec, entry: TensorEntry) -> list[str]:
    problems = []
    if entry.shape != part.shape:
        problems.append(f"{part.name!r} has shape {list(entry.shape)}, expected {list(part.shape)}")
    if entry.dtype not in WEIGHT_DTYPES:
        problems.append(f"{part.name!r} has dtype {entry.dtype}, expected one of {', '.join(WEIGHT_DTYPES)}")
    return problems


def _stored_problems(part: StoredPart, checkpoint: Checkpoint) -> list[str]:
    problems = [] if part.refusal is None else [part.refusal]
    for name, tensor in part.named_tensors():
        entry = checkpoint.tensors.get(name)
        shape = tensor.shape(part.shape)
        if entry is None:
            if tensor.is_required:
                problems.append(f"{name!r} is missing (shape {list(shape)})")
            continue
        # A single number is stored as [], [1] or [1, 1].
        if entry.shape != shape and (shape != () or prod(entry.shape) != 1):
            problems.append(f"{name!r} has shape {list(entry.shape)}, expected {list(shape)}")
        if entry.dtype not in tensor.dtypes:
            problems.append(f"{name!r} has dtype {entry.dtype}, expected one of {', '.join(tensor.dtypes)}")
    return problems


def _read_index(folder: ModelFolder) -> dict[str, str]:
    index = folder.json_object(INDEX_NAME)
    placement = index.get("weight_map")
    if not isinstance(placement, dict) or not placement:
        raise InvalidCheckpoint(f"{INDEX_NAME!r} has no weight_map.")
    result: dict[str, str] = {}
    for tensor, name in placement.items():
        if not isinstance(name, str) or not name.endswith(".safetensors"):
            raise InvalidCheckpoint(f"{INDEX_NAME!r} places {tensor!r} in {str(name)[:80]!r}, not a .safetensors file.")
        result[tensor] = name
    shards = len(set(result.values()))
    if shards > MAX_SHARDS:
        raise InvalidCheckpoint(f"{INDEX_NAME!r} names {shards:,} shards, the limit is {MAX_SHARDS:,}.")
    return result


def _compare_index(placement: dict[str, str], tensors: dict[str, TensorEntry]) -> list[str]:
    problems = []
    for name, file in placement.items():
        if name not in tensors:
            problems.append(f"{name!r} is missing from {file!r}")
        elif tensors[name].file != file:
            problems.append(f"{name!r} is in {tensors[name].file!r}, the index says {file!r}")
    problems.extend(
        f"{name!r} in {tensors[name].file!r} is not in the index" for name in sorted(tensors.keys() - placement)
    )
    return problems


def _no_weights(folder: ModelFolder) -> InvalidCheckpoint | UnsupportedModel:
    where = f"Model folder {str(folder.path)!r} has neither {SINGLE_NAME!r} nor {INDEX_NAME!r}"
    pickles = folder.names(".bin") + folder.names(".pt") + folder.names(".pth")
    if pickles:
        return UnsupportedModel(
            f"{where}, only pickle files such as {pickles[0]!r}, which can run code when they are read and are never "
            "opened. Use a revision of the model that has safetensors, or convert the files in a sandbox."
        )
    if folder.names(".gguf"):
        return UnsupportedModel(f"{where}; GGUF files are not read. Use the safetensors folder of the same model.")
    return InvalidCheckpoint(f"{where}. Download the weights as well as the config.")
