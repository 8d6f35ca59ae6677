"""The few calls of the CUDA driver that kernels need, typed, with errors as exceptions.

`Driver` is the interface, `CudaDriver` its implementation over `cuda.bindings`, which torch's CUDA wheels bring. All
calls work on the current context, torch's primary one. O(1) but for images. Knows neither kernels nor tensors.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, NewType, Protocol

from llmscale.errors import CudaError

Module = NewType("Module", object)
Function = NewType("Function", object)


class ImageRefused(CudaError):
    """The driver has no use for an image: another architecture, or a toolkit newer than the driver."""

    code = "cuda_image_refused"


class Driver(Protocol):
    """What `device.py` asks for. Streams are torch's handles."""

    def load_image(self, image: bytes) -> Module:
        """A cubin or fatbin into the current context. Raises ImageRefused or CudaError."""

    def function(self, module: Module, name: str) -> Function:
        """A kernel. Raises CudaError if the module has none of this name."""

    def allow_shared_bytes(self, function: Function, shared_bytes: int) -> None:
        """Lets launches ask for more than 48 KiB of dynamic shared memory."""

    def launch(
        self, function: Function, grid: tuple[int, int, int], threads: int, shared_bytes: int, stream: int, values: int
    ) -> None:
        """Starts a kernel; `values` is the address of an array of pointers to argument values."""

    def copy_batch(self, targets: Sequence[int], sources: Sequence[int], sizes: Sequence[int], stream: int) -> None:
        """Starts copies that do not depend on each other. The stream must not be the default one: there the driver
        falls back to one call per copy.
        """

    def register_host(self, address: int, size_bytes: int) -> None:
        """Pins memory of this process, so that copy engines and kernels reach it, until `unregister_host`."""

    def unregister_host(self, address: int) -> None:
        """Lets registered memory go."""


class CudaDriver:
    """Over `cuda.bindings.driver`. Raises CudaError where that is not installed or finds no driver library."""

    def __init__(self) -> None:
        try:
            from cuda.bindings import driver
        except ImportError as error:
            raise CudaError(
                "cuda.bindings is not installed, without which kernels cannot be loaded. Install torch for CUDA 13, "
                "which brings it, or `pip install 'cuda-bindings>=13.0.3'`."
            ) from error
        self._cuda: Any = driver
        try:
            self._call("cuInit", 0)
        except RuntimeError as error:  # the bindings raise a RuntimeError of their own where libcuda is missing
            raise CudaError(f"The CUDA driver library cannot be loaded: {error}") from error

    def load_image(self, image: bytes) -> Module:
        return Module(self._call("cuModuleLoadData", image))

    def function(self, module: Module, name: str) -> Function:
        return Function(self._call("cuModuleGetFunction", module, name.encode()))

    def allow_shared_bytes(self, function: Function, shared_bytes: int) -> None:
        attribute = self._cuda.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        self._call("cuFuncSetAttribute", function, attribute, shared_bytes)

    def launch(
        self, function: Function, grid: tuple[int, int, int], threads: int, shared_bytes: int, stream: int, values: int
    ) -> None:
        self._call("cuLaunchKernel", function, *grid, threads, 1, 1, shared_bytes, stream, values, 0)

    def copy_batch(self, targets: Sequence[int], sources: Sequence[int], sizes: Sequence[int], stream: int) -> None:
        attributes = self._cuda.CUmemcpyAttributes()
        # Sources are read when the stream comes to the copy, not at the call.
        attributes.srcAccessOrder = self._cuda.CUmemcpySrcAccessOrder.CU_MEMCPY_SRC_ACCESS_ORDER_STREAM
        wrapped = self._cuda.CUdeviceptr
        self._call(
            "cuMemcpyBatchAsync",
            [wrapped(address) for address in targets],
            [wrapped(address) for address in sources],
            list(sizes),
            len(sizes),
            [attributes],
            [0],
            1,
            stream,
        )

    def register_host(self, address: int, size_bytes: int) -> None:
        # CU_MEMHOSTREGISTER_PORTABLE, for all contexts, and _DEVICEMAP, because kernels copy blocks too.
        self._call("cuMemHostRegister", address, size_bytes, 1 | 2)

    def unregister_host(self, address: int) -> None:
        self._call("cuMemHostUnregister", address)

    def _call(self, name: str, *arguments: object) -> object:
        status, *results = getattr(self._cuda, name)(*arguments)
        if int(status) != 0:
            refused = {
                self._cuda.CUresult.CUDA_ERROR_NO_BINARY_FOR_GPU,
                self._cuda.CUresult.CUDA_ERROR_UNSUPPORTED_PTX_VERSION,
                self._cuda.CUresult.CUDA_ERROR_INVALID_IMAGE,
                self._cuda.CUresult.CUDA_ERROR_JIT_COMPILER_NOT_FOUND,
            }
            raise (ImageRefused if status in refused else CudaError)(f"{name} answered {status.name} ({int(status)})")
        return results[0] if results else None


def address_of(values: ctypes.Array[ctypes.c_void_p]) -> int:
    """For `Driver.launch`."""
    return ctypes.addressof(values)
