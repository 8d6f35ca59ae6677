"""Compiles what a launch would run, without a device: records launches, then asks Triton for any architecture's cubins.

Types, constants, alignments and options are taken from the arguments of real launches, as Triton's own dispatch takes
them, so what is checked is what runs. Without the attribute of 16-byte alignment loads come out 2 bytes wide.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

MAX_SHARED_BYTES = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""What one program may have of an architecture's shared memory."""
TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float64: "fp64",
    torch.int32: "i32",
    torch.int64: "i64",
}
OPTIONS = {"num_warps", "num_stages", "enable_fp_fusion"}


@dataclass(frozen=True, slots=True)
class Launch:
    """One kernel with the arguments and options of a launch."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        return str(self.kernel.fn.__name__)

    def fixed(self) -> tuple[object, ...]:
        """What a captured graph fixes: name, grid, options, scalars, and where tensors lie."""
        values = (value.data_ptr() if isinstance(value, Tensor) else value for value in self.arguments.values())
        return (self.name, self.grid, tuple(self.options.items()), *values)


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Launches are written down and not run."""
    launches: list[Launch] = []

    def record(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **named: Any) -> None:
        assert all(extent > 0 for extent in grid), grid
        options = {name: value for name, value in named.items() if name in OPTIONS}
        rest = {name: value for name, value in named.items() if name not in OPTIONS}
        given = dict(zip(kernel.arg_names, arguments, strict=False)) | rest
        assert given.keys() == set(kernel.arg_names), (kernel.arg_names, given.keys())
        launches.append(Launch(kernel, grid, given, options))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JITFunction, "run", record)
        yield launches


def compiled(launch: Launch, capability: int, *, aligned: bool = True) -> Any:
    """The kernel for sm_<capability>, specialized as Triton's dispatch would; not `aligned` forgets all alignments."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int], list[list[Any]]] = {}
    for index, parameter in enumerate(launch.kernel.params):
        name, value = parameter.name, launch.arguments[parameter.name]
        specialized = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1 and specialized):
            signature[name], constants[name] = "constexpr", value
            continue
        divisible = True
        if isinstance(value, Tensor):
            signature[name] = f"*{TYPES[value.dtype]}"
        elif isinstance(value, float):
            signature[name], divisible = "fp32", False
        else:
            signature[name], divisible = "i32", specialized and value % 16 == 0
        if divisible and aligned:
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=launch.options)


def tool(name: str) -> Path:
    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name


def machine_code(kernel: Any, folder: Path) -> str:
    """The SASS of a compiled kernel."""
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    command = [str(tool("cuobjdump")), "-sass", str(cubin)]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout


def stack_bytes(kernel: Any, folder: Path) -> int:
    """Bytes of stack per thread: what was spilled."""
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    command = [str(tool("cuobjdump")), "-res-usage", str(cubin)]
    usage = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    return int(usage.split("STACK:")[1].split()[0])
