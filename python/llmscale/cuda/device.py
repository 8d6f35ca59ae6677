"""One CUDA device as a `Launcher`: loads a kernel's image when it is first launched, and launches on torch's stream.

O(1) per launch: one dictionary look-up and one driver call. Works in torch's primary context, which torch makes
current. Does not know what kernels compute, and owns no memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch

from llmscale.cuda.driver import CudaDriver, Driver, Function, Module, address_of
from llmscale.cuda.images import ImageFolder
from llmscale.cuda.launch import DeviceLimits, Launch, Parameters
from llmscale.cuda.sources import source_of
from llmscale.errors import NoCudaDevice

FREE_SHARED_BYTES = 48 << 10
"""Dynamic shared memory that a kernel may have without asking."""


class CudaDevice:
    """Kernels of one device. Not for several threads at once."""

    def __init__(self, index: int, limits: DeviceLimits, driver: Driver, images: ImageFolder) -> None:
        self._index = index
        self._limits = limits
        self._driver = driver
        self._images = images
        self._modules: dict[str, Module] = {}
        self._functions: dict[str, Function] = {}
        self._allowed: dict[str, int] = {}

    @property
    def limits(self) -> DeviceLimits:
        return self._limits

    @property
    def driver(self) -> Driver:
        return self._driver

    def launch(self, launch: Launch) -> None:
        function = self._functions.get(launch.kernel) or self._load(launch.kernel)
        if launch.shared_bytes > self._allowed.get(launch.kernel, FREE_SHARED_BYTES):
            self._driver.allow_shared_bytes(function, launch.shared_bytes)
            self._allowed[launch.kernel] = launch.shared_bytes
        parameters = Parameters(launch.arguments)
        self._driver.launch(
            function, launch.grid, launch.threads, launch.shared_bytes, self._stream(), address_of(parameters.pointers)
        )

    def copy_batch(self, targets: Sequence[int], sources: Sequence[int], sizes: Sequence[int]) -> None:
        """Copies of the driver's own engines on the current stream, which must not be the default one."""
        stream = self._stream()
        assert stream != 0, "on the default stream the driver copies one by one"
        self._driver.copy_batch(targets, sources, sizes, stream)

    def _load(self, kernel: str) -> Function:
        source = source_of(kernel)
        if source not in self._modules:
            self._modules[source] = self._images.load(self._driver, source, self._limits.compute_capability)
        self._functions[kernel] = self._driver.function(self._modules[source], kernel)
        return self._functions[kernel]

    def _stream(self) -> int:
        return int(torch.cuda.current_stream(self._index).cuda_stream)


@cache
def cuda_device(index: int) -> CudaDevice:
    """Device `index` of this process. Raises NoCudaDevice, or CudaError where kernels cannot be loaded."""
    if not torch.cuda.is_available():
        raise NoCudaDevice(
            "no CUDA device: torch finds none. It needs an NVIDIA driver (580 or newer) and torch's build for CUDA 13."
        )
    if index >= torch.cuda.device_count():
        raise NoCudaDevice(f"no CUDA device {index}: there are {torch.cuda.device_count()}, counted from 0.")
    torch.cuda.current_stream(index).synchronize()  # makes the primary context, which the driver's calls work in
    properties = torch.cuda.get_device_properties(index)
    limits = DeviceLimits(
        (properties.major, properties.minor),
        properties.multi_processor_count,
        properties.shared_memory_per_block_optin,
        properties.shared_memory_per_multiprocessor,
    )
    return CudaDevice(index, limits, CudaDriver(), ImageFolder())
