"""Which devices there are, and which one a process uses when it is told "auto".

One line per device. Choosing imports no torch where no NVIDIA driver or no torch is installed, so that a node on a
plain machine starts as fast as before; where both are, a child process asks torch. It does not know what a device can
do, but for the generation that kernels need.
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from itertools import takewhile
from typing import TYPE_CHECKING

from llmscale.errors import ConfigError, NoCudaDevice
from llmscale.extras import lacking

if TYPE_CHECKING:
    from llmscale.devices.interface import Device

DEVICES: dict[str, str] = {
    "cpu": "llmscale.devices.cpu",
    "cuda": "llmscale.devices.cuda",
}
"""Name and module, which has `open_device(index) -> Device`."""
LEAST_CAPABILITY = (8, 0)
"""Kernels are compiled for Ampere and later."""
PROBE_SECONDS = 60.0
_PROBE = (
    "from llmscale.devices.registry import devices_of_torch\n"
    "for device in devices_of_torch(): print(device.memory_bytes, *device.capability)"
)


@dataclass(frozen=True, slots=True)
class CudaFacts:
    """What is known of a device before anything is opened on it."""

    memory_bytes: int
    capability: tuple[int, int]


def open_device(name: str, index: int = 0) -> Device:
    """Device `index` of a kind, for this process from now on. Raises ConfigError for a name that is none, and the
    device's own errors where it cannot be had."""
    if name not in DEVICES:
        raise ConfigError(f"device is {name!r}, it must be auto or one of {', '.join(DEVICES)}")
    make: Callable[[int], Device] = import_module(DEVICES[name]).open_device
    return make(index)


def choose(asked: str, workers: int = 1) -> str:
    """The name of the device for so many workers of this host; "auto" is CUDA where torch sees a device for each that
    kernels can run on. Without torch it is the CPU, whatever drivers there are.

    Raises NoCudaDevice if CUDA was asked for and there is too little of it, ConfigError for a name that is none.
    """
    if asked == "auto":
        # Worker k has device k, so one that is too old hides those behind it.
        usable = takewhile(lambda device: device.capability >= LEAST_CAPABILITY, cuda_devices())
        return "cuda" if len(list(usable)) >= workers else "cpu"
    if asked not in DEVICES:
        raise ConfigError(f"device is {asked!r}, it must be auto or one of {', '.join(DEVICES)}")
    if asked == "cuda" and (lack := lacking(("torch",), "node")) is not None:
        raise NoCudaDevice(f"device is cuda, and {lack}. Or serve with --device cpu.")
    if asked == "cuda" and (there := len(cuda_devices())) < workers:
        raise NoCudaDevice(
            f"device is cuda for {workers} workers on this host, but torch sees {there} CUDA devices. It needs an"
            " NVIDIA driver (580 or newer) and torch's build for CUDA 13; or serve with --device cpu."
        )
    return asked


@cache
def cuda_devices() -> tuple[CudaFacts, ...]:
    """Each CUDA device that torch sees; none where it is not installed. Raises NoCudaDevice if it cannot be asked."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return ()
    if find_spec("torch") is None:
        # A base install on a machine with a driver: the native executor needs neither.
        return ()
    if "torch" in sys.modules:
        return devices_of_torch()
    # In a child: what has CUDA open cannot fork workers, and importing torch takes seconds that a node need not have.
    command = [sys.executable, "-c", _PROBE]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=PROBE_SECONDS, check=False)  # noqa: S603  # ours
    except subprocess.TimeoutExpired as error:
        raise NoCudaDevice(
            f"an NVIDIA driver is installed, but torch has not named its devices within {PROBE_SECONDS:g} s. Repair the"
            " installation, or serve with --device cpu."
        ) from error
    if answer.returncode != 0:
        raise NoCudaDevice(
            f"an NVIDIA driver is installed, but torch cannot be asked for its devices: {answer.stderr[-400:]} Repair"
            " the installation, or serve with --device cpu."
        )
    rows = (map(int, line.split()) for line in answer.stdout.splitlines())
    return tuple(CudaFacts(memory, (major, minor)) for memory, major, minor in rows)


def devices_of_torch() -> tuple[CudaFacts, ...]:
    """The same, asked in this process."""
    import torch

    if not torch.cuda.is_available():
        return ()
    found = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    return tuple(CudaFacts(each.total_memory, (each.major, each.minor)) for each in found)
