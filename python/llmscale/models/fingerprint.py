"""What peers compare to notice that they serve different weights or tokenizers: a fast fingerprint of a checkpoint,
and a digest of the files that make text.

The fingerprint is SHA-256 over every tensor's name, dtype and shape and over up to sixteen evenly spaced pages of its
data, the first and the last among them; tensors up to 64 KiB are read whole. It does not depend on how tensors are
spread over files. It tells checkpoints apart that were trained differently, since training changes all of a tensor; it
is no proof against someone who changes single weights on purpose. Reads at most 64 KiB per tensor, about 20 MB for a
7 B model.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from llmscale.models.checkpoint import Checkpoint
from llmscale.models.safetensors_header import TensorEntry

PAGE_BYTES = 4_096
PAGES_PER_TENSOR = 16
SCHEME = "sampled-sha256-1"
TEXT_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def weights_fingerprint(checkpoint: Checkpoint) -> str:
    """The fingerprint as `scheme:hexadecimal`; equal text means equal names, dtypes, shapes and sampled bytes."""
    by_file: dict[str, list[TensorEntry]] = {name: [] for name in checkpoint.files}
    for entry in checkpoint.tensors.values():
        by_file[entry.file].append(entry)
    digests: dict[str, bytes] = {}
    for name, entries in by_file.items():
        digests.update(_digest_file(checkpoint.files[name], entries))
    total = hashlib.sha256()
    for name in sorted(digests):
        total.update(digests[name])
    return f"{SCHEME}:{total.hexdigest()}"


def tokenizer_digest(folder: Path) -> bytes:
    """SHA-256 (32 bytes) over length and bytes of each of `TEXT_FILES`, absent ones as empty; part of the wire."""
    digest = hashlib.sha256()
    for name in TEXT_FILES:
        file = folder / name
        content = file.read_bytes() if file.is_file() else b""
        digest.update(len(content).to_bytes(8, "little"))
        digest.update(content)
    return digest.digest()


def _digest_file(path: Path, entries: list[TensorEntry]) -> dict[str, bytes]:
    """Digest of each tensor of one file, read in ascending order."""
    digests: dict[str, bytes] = {}
    with path.open("rb") as file:
        for entry in sorted(entries, key=lambda entry: entry.begin):
            # repr of a tuple of names and numbers is unambiguous: strings are quoted and escaped.
            digest = hashlib.sha256(repr((entry.name, entry.dtype, entry.shape)).encode())
            for begin, end in _sampled_ranges(entry.begin, entry.end):
                file.seek(begin)
                digest.update(file.read(end - begin))
            digests[entry.name] = digest.digest()
    return digests


def _sampled_ranges(begin: int, end: int) -> list[tuple[int, int]]:
    size = end - begin
    if size <= PAGES_PER_TENSOR * PAGE_BYTES:
        return [(begin, end)]
    last = size - PAGE_BYTES
    starts = [begin + last * page // (PAGES_PER_TENSOR - 1) for page in range(PAGES_PER_TENSOR)]
    return [(start, start + PAGE_BYTES) for start in starts]
