"""What small tensors behind quantized weights must hold so that the native executor may pass over them.

A group index that only counts inputs says nothing, and a bias of zeros adds nothing; writers of GPTQ store both. Reads
these tensors whole, without torch: four bytes for each input of a projection. It does not know products.
"""

from __future__ import annotations

from array import array

from llmscale.errors import UnsupportedModel
from llmscale.models.checkpoint import Checkpoint
from llmscale.models.safetensors_header import DTYPE_BITS, TensorEntry
from llmscale.models.stored import StoredPart
from llmscale.quant.layouts import Int4Layout

_INDEX_CODES = {"I32": "i", "I64": "q"}


def ordered_inputs(layout: Int4Layout, checkpoint: Checkpoint) -> str | None:
    """The name of the first group index whose inputs are not in the order of their groups; None if all are."""
    if layout.group_index is None or layout.group_size is None:
        return None
    for name, entry in checkpoint.tensors.items():
        if not name.endswith(f".{layout.group_index}") or entry.dtype not in _INDEX_CODES:
            continue
        groups = array(_INDEX_CODES[entry.dtype], _read(checkpoint, entry))
        if any(group != place // layout.group_size for place, group in enumerate(groups)):
            return name
    return None


def refuse_unused_biases(layout: Int4Layout, parts: tuple[StoredPart, ...], checkpoint: Checkpoint) -> None:
    """Raises UnsupportedModel where a projection that has no bias stores one that is not zero."""
    for part in parts:
        for name, tensor in part.named_tensors():
            entry = checkpoint.tensors.get(name)
            if tensor.suffix != layout.unused_bias or entry is None:
                continue
            size = DTYPE_BITS[entry.dtype] // 8
            content = _read(checkpoint, entry)
            # All bits but the sign's, which is the highest of a number's last byte.
            if any(byte & (0x7F if place % size == size - 1 else 0xFF) for place, byte in enumerate(content)):
                raise UnsupportedModel(
                    f"{name!r} is not zero, but this architecture has no bias there. The checkpoint is of another model"
                    " than its config says."
                )


def _read(checkpoint: Checkpoint, entry: TensorEntry) -> bytes:
    with checkpoint.files[entry.file].open("rb") as file:
        file.seek(entry.begin)
        return file.read(entry.end - entry.begin)
