"""A kernel launch as plain data: which kernel, how many threads, which arguments.

Makers of launches are pure; whoever carries them out is a `Launcher`: a device (`device.py`), or the emulation that
tests use, which takes the same array of pointers to argument values. O(arguments). Knows nothing of what a kernel does.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

Number = ctypes.c_int32 | ctypes.c_int64
Argument = Tensor | Number | None
"""A tensor is passed as its address, None as a null pointer. Sizes are those of the kernel's parameters."""

MAX_GRID = 2**31 - 1


@dataclass(frozen=True, slots=True)
class DeviceLimits:
    """What a launch depends on. Shared memory is what one block may ask for, and what a multiprocessor has."""

    compute_capability: tuple[int, int]
    multiprocessors: int
    max_shared_bytes: int
    shared_bytes_per_multiprocessor: int

    @property
    def has_bulk_copies(self) -> bool:
        return self.compute_capability >= (9, 0)


@dataclass(frozen=True, slots=True)
class Launch:
    """One launch on the current stream."""

    kernel: str
    grid: tuple[int, int, int]
    threads: int
    shared_bytes: int
    arguments: tuple[Argument, ...]

    def __post_init__(self) -> None:
        assert 0 < self.grid[0] <= MAX_GRID, self.grid
        assert all(0 < extent <= 65_535 for extent in self.grid[1:]), self.grid
        assert 0 < self.threads <= 1_024, self.threads


def int32s(*values: int) -> tuple[ctypes.c_int32, ...]:
    """Numbers as arguments."""
    return tuple(ctypes.c_int32(value) for value in values)


class Launcher(Protocol):
    """Carries out launches, in their order."""

    @property
    def limits(self) -> DeviceLimits:
        """Of the device."""

    def launch(self, launch: Launch) -> None:
        """Starts a kernel; tensors must live until it has ended, which torch's allocator sees to on its own streams."""


class Parameters:
    """The argument values of a launch and the array of pointers to them, as `cuLaunchKernel` takes it."""

    __slots__ = ("_values", "count", "pointers")

    def __init__(self, arguments: tuple[Argument, ...]) -> None:
        self._values = [_value(argument) for argument in arguments]
        self.count = len(self._values)
        addresses = (ctypes.addressof(value) for value in self._values)
        self.pointers = (ctypes.c_void_p * max(self.count, 1))(*addresses)


def _value(argument: Argument) -> ctypes.c_void_p | Number:
    if argument is None:
        return ctypes.c_void_p(None)
    if isinstance(argument, Tensor):
        return ctypes.c_void_p(argument.data_ptr())
    return argument
