"""Which image of a kernel file a device gets: the fatbin that ships, or what NVRTC makes of the sources.

A fatbin counts only if its manifest names the sources that are there, so that an edited kernel in a checkout is never
answered by an old image. The driver decides whether a fatbin fits; O(1) per file, once per process and device.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from llmscale.cuda.driver import Driver, ImageRefused, Module
from llmscale.cuda.nvrtc import architecture_of, compile_cubin
from llmscale.cuda.sources import CHECKOUT, PACKAGED, source_digest, source_folder


class Manifest(msgspec.Struct, frozen=True):
    """What `make cuda` writes beside the fatbins."""

    architectures: list[str]
    nvcc: str
    source_digest: str


class ImageFolder:
    """Fatbins and sources of one installation."""

    __slots__ = ("_cache", "_packaged", "_sources", "_usable")

    def __init__(self, packaged: Path = PACKAGED, checkout: Path = CHECKOUT, cache: Path | None = None) -> None:
        self._packaged = packaged
        self._sources = source_folder(packaged, checkout)
        self._cache = cache
        manifest = read_manifest(packaged)
        self._usable = manifest is not None and manifest.source_digest == source_digest(self._sources)

    def load(self, driver: Driver, source: str, compute_capability: tuple[int, int]) -> Module:
        """The kernels of one file. Raises CudaError if neither way gives an image that the driver takes."""
        fatbin = self._packaged / f"{source}.fatbin"
        if self._usable and fatbin.is_file():
            try:
                return driver.load_image(fatbin.read_bytes())
            except ImageRefused:
                # An older driver, or a device without an entry: torch's own compiler fits both.
                pass
        cubin = compile_cubin(self._sources, source, architecture_of(compute_capability), self._cache)
        return driver.load_image(cubin)


def read_manifest(packaged: Path) -> Manifest | None:
    """None where no fatbins are installed."""
    path = packaged / "manifest.json"
    return msgspec.json.decode(path.read_bytes(), type=Manifest) if path.is_file() else None
