"""Compiling a kernel file on the machine that runs it, with NVRTC from torch's own wheels, once per source and device.

The fallback where no fatbin fits: the kernels need no header but their own. 0.2 to 2 s per file; the cubin is kept in
the user's cache under a hash of sources, options and compiler, in a folder that only its owner can write. Does not
load what it makes.
"""

from __future__ import annotations

import hashlib
import os
import stat
import tempfile
from pathlib import Path
from typing import Any

from llmscale.cuda.sources import source_digest
from llmscale.env import CACHE_HOME
from llmscale.errors import CudaError

OPTIONS = ("-std=c++17", "-lineinfo")


def compile_cubin(folder: Path, name: str, architecture: str, cache: Path | None = None) -> bytes:
    """`folder/kernels/name.cu` for an architecture such as sm_90a. Raises CudaError with the compiler's words."""
    nvrtc = _nvrtc()
    major, minor = _checked(nvrtc, nvrtc.nvrtcVersion())
    key = f"{source_digest(folder)} {name} {architecture} {OPTIONS} {major}.{minor}"
    cached = _cache_folder(cache) / f"{name}-{architecture}-{hashlib.sha256(key.encode()).hexdigest()[:24]}.cubin"
    if cached.is_file():
        return cached.read_bytes()
    cubin = _compile(nvrtc, folder, name, architecture)
    # Written whole or not at all: two processes may compile the same file at once.
    with tempfile.NamedTemporaryFile(dir=cached.parent, delete=False) as file:
        file.write(cubin)
    Path(file.name).rename(cached)
    return cubin


def architecture_of(compute_capability: tuple[int, int]) -> str:
    """The target with all features of a device: those since 9.0 have an architecture-specific one."""
    major, minor = compute_capability
    return f"sm_{major}{minor}{'a' if major >= 9 else ''}"


def _compile(nvrtc: Any, folder: Path, name: str, architecture: str) -> bytes:
    source = (folder / "kernels" / f"{name}.cu").read_bytes()
    (program,) = _checked(nvrtc, nvrtc.nvrtcCreateProgram(source, f"{name}.cu".encode(), 0, [], []))
    options = [f"--gpu-architecture={architecture}", *OPTIONS, f"-I{folder / 'include'}"]
    status = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])[0]
    (size,) = _checked(nvrtc, nvrtc.nvrtcGetProgramLogSize(program))
    # NVRTC writes into these. Bytes of length 1, the size of an empty log, are one object for the whole process: a NUL
    # written there turned every b" " of it into b"\0".
    log = bytearray(size)
    _checked(nvrtc, nvrtc.nvrtcGetProgramLog(program, log))
    if int(status) != 0:
        words = log.rstrip(bytes(1)).decode(errors="replace")
        raise CudaError(f"NVRTC cannot compile {name}.cu for {architecture}:\n{words}")
    (size,) = _checked(nvrtc, nvrtc.nvrtcGetCUBINSize(program))
    cubin = bytearray(size)
    _checked(nvrtc, nvrtc.nvrtcGetCUBIN(program, cubin))
    _checked(nvrtc, nvrtc.nvrtcDestroyProgram(program))
    return bytes(cubin)


def _nvrtc() -> Any:
    try:
        from cuda.bindings import nvrtc
    except ImportError as error:
        raise CudaError("cuda.bindings is not installed; torch for CUDA 13 brings it.") from error
    return nvrtc


def _checked(nvrtc: Any, answer: tuple[Any, ...]) -> tuple[Any, ...]:
    status, *results = answer
    if int(status) != 0:
        raise CudaError(f"NVRTC answered {nvrtc.nvrtcGetErrorString(status)[1].decode()}")
    return tuple(results)


def _cache_folder(given: Path | None) -> Path:
    home = CACHE_HOME.read()
    base = given or (Path(home) if home else Path.home() / ".cache") / "llmscale" / "cubins"
    base.mkdir(parents=True, exist_ok=True, mode=0o700)
    state = base.stat()
    if state.st_uid != os.getuid() or state.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise CudaError(
            f"Compiled kernels are kept in {base}, which others can write: its code would run in this process. Make it "
            f"yours alone (chmod go-w), or set {CACHE_HOME.name} to another folder."
        )
    return base
