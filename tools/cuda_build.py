"""Builds of the CUDA sources: fatbins for every architecture, and the emulation that runs kernels on a CPU.

Every product lies under `.build/cuda/` by the hash of its sources and flags, so that what has been built is not built
again, and processes that want the same product wait for the one that makes it. `python -m tools.cuda_build`
writes what ships. Knows compilers and files; not what a kernel does.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[1]
CUDA = ROOT / "cuda"
BUILD = ROOT / ".build" / "cuda"
IMAGES = ROOT / "python" / "llmscale" / "cuda" / "images"
NVCC_ENVIRONMENT = ROOT / ".build" / "nvcc"

ARCHITECTURES = ("80", "89", "90a", "100a")
NVCC_FLAGS = (
    "-std=c++17",
    "-O3",
    "-lineinfo",
    "-Werror",
    "all-warnings",
    "-Xptxas",
    "-v,-warn-spills,-warn-lmem-usage",
)
# -U: glibc's checked longjmp takes a switch of stacks for an attack.
HOST_FLAGS = (
    "-x",
    "c++",
    "-std=c++17",
    "-g1",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-Wno-unknown-pragmas",
    "-Wno-maybe-uninitialized",
    "-U_FORTIFY_SOURCE",
)
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")


class BuildError(Exception):
    """A compiler is missing or has refused."""


def kernel_files() -> list[Path]:
    """The sources with entry points."""
    return sorted((CUDA / "kernels").glob("*.cu"))


def device_sources() -> list[Path]:
    """Everything that a device build reads."""
    return sorted([*kernel_files(), *(CUDA / "include").rglob("*.cuh")])


def emulation_library() -> Path:
    """The kernels as a shared library for ctypes."""
    return _emulation("emulation.so", ["-O1", "-fPIC", "-shared", "check/host_abi.cpp"])


def sanitized_runner() -> Path:
    """The kernels as a program under AddressSanitizer and UndefinedBehaviorSanitizer.

    Not optimized: that compiles in 5 s of CPU time instead of 12, and the few launches are small.
    """
    return _emulation("runner", ["-O0", *SANITIZERS, "check/host_abi.cpp", "check/runner.cpp"])


def fatbin(source: Path) -> Path:
    """One fatbin of all architectures. Beside it `NAME.log` has what ptxas says of registers and spills.

    There is no PTX in it: a driver would compile the oldest architecture's for a newer device, where bulk copies are
    missing from it. Devices without an entry get what NVRTC compiles for them.
    """
    nvcc = find_nvcc()
    targets = [f"-gencode=arch=compute_{name},code=sm_{name}" for name in ARCHITECTURES]
    flags = [*NVCC_FLAGS, "-I", str(CUDA / "include"), *targets, "-fatbin"]

    def make(folder: Path) -> None:
        command = [str(nvcc), *flags, "-t", "2", "-o", str(folder / f"{source.stem}.fatbin"), str(source)]
        (folder / f"{source.stem}.log").write_text(_run(command), encoding="utf-8")

    sources = [source, *(path for path in device_sources() if path.suffix == ".cuh")]
    return _product(f"{source.stem}.fatbin", sources, [str(nvcc), *flags], make)


def find_nvcc() -> Path:
    """Raises BuildError where no nvcc was installed."""
    found = sorted(NVCC_ENVIRONMENT.glob("lib/python3*/site-packages/nvidia/cu13/bin/nvcc"))
    if not found:
        raise BuildError(f"nvcc is not installed in {NVCC_ENVIRONMENT}; run `make cuda`")
    return found[0]


def nvcc_version() -> str:
    """Such as 13.0.88."""
    found = re.search(r"V(\d+\.\d+\.\d+)", _run([str(find_nvcc()), "--version"]))
    assert found is not None
    return found[1]


def write_images() -> None:
    """Fatbins, the sources that they were made of, and a manifest that names both, as package data."""
    if IMAGES.exists():
        shutil.rmtree(IMAGES)
    (IMAGES / "source").mkdir(parents=True)
    for source in kernel_files():
        shutil.copy(fatbin(source), IMAGES / f"{source.stem}.fatbin")
    for path in device_sources():
        target = IMAGES / "source" / path.relative_to(CUDA)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    sys.path.insert(0, str(ROOT / "python"))
    from llmscale.cuda.sources import source_digest

    manifest = {
        "architectures": list(ARCHITECTURES),
        "nvcc": nvcc_version(),
        "source_digest": source_digest(IMAGES / "source"),
    }
    (IMAGES / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def _emulation(name: str, arguments: list[str]) -> Path:
    compiler = shutil.which("g++")
    if compiler is None:
        raise BuildError("g++ is not installed; the emulation of kernels is compiled with it")
    sources = sorted(path for path in CUDA.rglob("*") if path.suffix in {".cu", ".cuh", ".h", ".cpp"})
    flags = [*HOST_FLAGS, "-I.", "-Iinclude", *arguments]

    def make(folder: Path) -> None:
        (folder / "log").write_text(_run([compiler, *flags, "-o", str(folder / name)]), encoding="utf-8")

    return _product(name, sources, flags, make)


def _product(name: str, sources: list[Path], flags: list[str], make: Callable[[Path], None]) -> Path:
    """The product of these sources and flags, made by `make(folder)` unless it is there."""
    digest = hashlib.sha256("\0".join(flags).encode())
    for path in sources:
        digest.update(f"\0{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    folder = BUILD / f"{name}-{digest.hexdigest()[:16]}"
    with _locked(BUILD / f"{name}.lock"):
        if not folder.is_dir():
            unfinished = folder.with_suffix(f".{os.getpid()}")
            unfinished.mkdir(parents=True)
            try:
                make(unfinished)
                unfinished.rename(folder)
            finally:
                shutil.rmtree(unfinished, ignore_errors=True)
            for old in BUILD.glob(f"{name}-*"):
                if old != folder:
                    shutil.rmtree(old)
    return folder / name


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _run(command: list[str]) -> str:
    done = subprocess.run(command, cwd=CUDA, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode != 0:
        raise BuildError(f"{' '.join(command)}\n{done.stdout}")
    return done.stdout


if __name__ == "__main__":
    try:
        write_images()
    except BuildError as error:
        raise SystemExit(str(error)) from error
