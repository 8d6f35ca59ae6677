"""Where the kernels' sources and images are, and which source has which kernel.

An installed package has fatbins with the sources that they were made of; a checkout has `cuda/`, and fatbins once
`make cuda` has run. The digest of the sources ties the two together. O(bytes of the sources). Loads nothing.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from llmscale.errors import CudaError

PACKAGED = Path(__file__).parent / "images"
CHECKOUT = Path(__file__).parents[3] / "cuda"

SOURCES = ("kv_copy", "kv_pack", "w4_panel", "w4a16_matmul", "w8_panel", "w8a16_matmul")


def source_of(kernel: str) -> str:
    """The file of a kernel, without its suffix: the longest name that the kernel's begins with."""
    found = [name for name in SOURCES if kernel.startswith(name)]
    if kernel == "kv_unpack_e4m3":
        return "kv_pack"
    assert found, kernel
    return max(found, key=len)


def source_folder(packaged: Path = PACKAGED, checkout: Path = CHECKOUT) -> Path:
    """The folder with `kernels/` and `include/`; of a checkout before those that were packaged. Raises CudaError."""
    for folder in (checkout, packaged / "source"):
        if (folder / "kernels").is_dir():
            return folder
    raise CudaError(
        f"The CUDA kernels are neither in {packaged} nor in {checkout}. Install a wheel of llmscale for GPUs, or run "
        "`make cuda` in a checkout."
    )


def source_digest(folder: Path) -> str:
    """SHA-256 over names and contents of everything that a device build reads."""
    digest = hashlib.sha256()
    for path in sorted([*folder.glob("kernels/*.cu"), *folder.glob("include/**/*.cuh")]):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0")
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()
