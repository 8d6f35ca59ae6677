"""The emulation of the kernels as a `Launcher`: launches made for a device run on CPU tensors.

`Emulator` calls the shared library in this process; `SanitizedEmulator` sends each launch, buffers included, to a
program built with AddressSanitizer and UndefinedBehaviorSanitizer. A launch in which the emulation finds a mistake
raises `EmulationError`. Shared memory is checked against what the kernel's source states.
"""

from __future__ import annotations

import ctypes
import enum
import struct
import subprocess
from functools import cache

import pytest
import torch
from torch import Tensor

from llmscale.cuda.launch import DeviceLimits, Launch, Parameters
from tools import cuda_build

HOPPER = DeviceLimits((9, 0), multiprocessors=3, max_shared_bytes=232_448, shared_bytes_per_multiprocessor=233_472)
"""With few multiprocessors, so that small problems have several iterations per block."""
ADA = DeviceLimits((8, 9), multiprocessors=2, max_shared_bytes=101_376, shared_bytes_per_multiprocessor=102_400)
SEEDS = (0, 1, 2)


class PlantedBug(enum.IntEnum):
    """As in cuda/check/emulation.h."""

    NONE = 0
    NO_BARRIER_BEFORE_REUSE = 1
    NO_WAIT_FOR_COPY = 2
    NO_WAIT_FOR_STORE = 3
    LANE_ABSENT_FROM_SHUFFLE = 4
    ROW_PAST_THE_END = 5


class EmulationError(Exception):
    """What the emulation or a sanitizer found in a launch."""


@cache
def library() -> ctypes.CDLL:
    try:
        loaded = ctypes.CDLL(str(cuda_build.emulation_library()))
    except cuda_build.BuildError as error:
        if "is not installed" in str(error):
            pytest.skip(str(error))
        raise
    loaded.check_kernel_name.restype = ctypes.c_char_p
    return loaded


def kernel_names() -> list[str]:
    found: list[str] = []
    while (name := library().check_kernel_name(len(found))) is not None:
        found.append(name.decode())
    return found


def shared_bytes(kernel: str) -> int:
    return int(library().check_shared_bytes(kernel.encode()))


class Emulator:
    """In this process. `launches` are those that were carried out."""

    def __init__(self, seed: int = 0, limits: DeviceLimits = HOPPER, bug: PlantedBug = PlantedBug.NONE) -> None:
        self.seed = seed
        self.limits = limits
        self.bug = bug
        self.launches: list[Launch] = []

    def launch(self, launch: Launch) -> None:
        assert launch.shared_bytes == shared_bytes(launch.kernel), launch.kernel
        assert launch.shared_bytes <= self.limits.max_shared_bytes, launch
        parameters = Parameters(launch.arguments)
        grid = (ctypes.c_uint * 3)(*launch.grid)
        message = ctypes.create_string_buffer(512)
        library().check_plant(int(self.bug))
        failed = library().check_launch(
            launch.kernel.encode(),
            grid,
            ctypes.c_uint(launch.threads),
            ctypes.c_uint(launch.shared_bytes),
            ctypes.c_uint(self.seed),
            parameters.pointers,
            ctypes.c_uint(parameters.count),
            message,
            ctypes.c_size_t(len(message)),
        )
        library().check_plant(0)
        if failed:
            raise EmulationError(message.value.decode())
        self.launches.append(launch)


class SanitizedEmulator:
    """In a process of its own per launch, under sanitizers."""

    def __init__(self, seed: int = 1, limits: DeviceLimits = HOPPER, bug: PlantedBug = PlantedBug.NONE) -> None:
        self.seed = seed
        self.limits = limits
        self.bug = bug

    def launch(self, launch: Launch) -> None:
        tensors = [argument for argument in launch.arguments if isinstance(argument, Tensor)]
        done = subprocess.run(
            [cuda_build.sanitized_runner()],
            input=self._case(launch),
            capture_output=True,
            check=False,
            env={"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"},
        )
        if done.returncode != 0:
            raise EmulationError(done.stderr.decode(errors="replace"))
        sizes = [tensor.numel() * tensor.itemsize for tensor in tensors]
        assert len(done.stdout) == sum(sizes)
        at = 0
        for tensor, size in zip(tensors, sizes, strict=True):
            if size:
                back = torch.frombuffer(bytearray(done.stdout[at : at + size]), dtype=torch.uint8)
                tensor.copy_(back.view(tensor.dtype).view(tensor.shape))
            at += size

    def _case(self, launch: Launch) -> bytes:
        name = launch.kernel.encode()
        head = (*launch.grid, launch.threads, launch.shared_bytes, self.seed, int(self.bug), len(launch.arguments))
        parts = [struct.pack("=I", len(name)), name, struct.pack("=8I", *head)]
        for argument in launch.arguments:
            if isinstance(argument, Tensor):
                content = argument.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
                parts.append(struct.pack("=II", 1, len(content)) + content)
            else:
                parts.append(struct.pack("=Iq", 0, 0 if argument is None else argument.value))
        return b"".join(parts)
