"""Which devices there are, and which one a process uses when it is told "auto".

One line per device. Choosing imports no torch where no NVIDIA driver is installed, so that a node on a plain machine
starts as fast as before; where one is, a child process asks torch. It does not know what a device can do.
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING

from llmscale.errors import ConfigError, NoCudaDevice

if TYPE_CHECKING:
    from llmscale.devices.interface import Device

DEVICES: dict[str, str] = {
    "cpu": "llmscale.devices.cpu",
    "cuda": "llmscale.devices.cuda",
}
"""Name and module, which has `open_device(index) -> Device`."""
PROBE_SECONDS = 60.0
_PROBE = "from llmscale.devices.registry import torch_memory_bytes; print(*torch_memory_bytes())"


def open_device(name: str, index: int = 0) -> Device:
    """Device `index` of a kind, for this process from now on. Raises ConfigError for a name that is none, and the
    device's own errors where it cannot be had."""
    if name not in DEVICES:
        raise ConfigError(f"device is {name!r}, it must be auto or one of {', '.join(DEVICES)}")
    make: Callable[[int], Device] = import_module(DEVICES[name]).open_device
    return make(index)


def choose(asked: str, workers: int = 1) -> str:
    """The name of the device for so many workers of this host; "auto" is CUDA where torch sees enough devices.

    Raises NoCudaDevice if CUDA was asked for and there is too little of it, ConfigError for a name that is none.
    """
    if asked == "auto":
        return "cuda" if len(cuda_memory_bytes()) >= workers else "cpu"
    if asked not in DEVICES:
        raise ConfigError(f"device is {asked!r}, it must be auto or one of {', '.join(DEVICES)}")
    if asked == "cuda" and (there := len(cuda_memory_bytes())) < workers:
        raise NoCudaDevice(
            f"device is cuda for {workers} workers on this host, but torch sees {there} CUDA devices. It needs an"
            " NVIDIA driver (580 or newer) and torch's build for CUDA 13; or serve with --device cpu."
        )
    return asked


@cache
def cuda_memory_bytes() -> tuple[int, ...]:
    """The memory of each CUDA device that torch sees."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return ()
    if "torch" in sys.modules:
        return torch_memory_bytes()
    # In a child: what has CUDA open cannot fork workers, and importing torch takes seconds that a node need not have.
    command = [sys.executable, "-c", _PROBE]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=PROBE_SECONDS, check=False)  # noqa: S603  # ours
    if answer.returncode != 0:
        raise NoCudaDevice(
            f"an NVIDIA driver is installed, but torch cannot be asked for its devices: {answer.stderr[-400:]} Repair"
            " the installation, or serve with --device cpu."
        )
    return tuple(int(word) for word in answer.stdout.split())


def torch_memory_bytes() -> tuple[int, ...]:
    """The same, asked in this process."""
    import torch

    if not torch.cuda.is_available():
        return ()
    return tuple(torch.cuda.get_device_properties(index).total_memory for index in range(torch.cuda.device_count()))
