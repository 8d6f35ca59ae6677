"""The kernels compiled for four architectures, by nvcc and by NVRTC: no warning, no spill, and the instructions meant.

What a kernel is made of is read from the machine code, with the disassembler in triton's wheel: tensor-core products,
copies of 16 bytes, bulk copies, no local memory. Nothing of it needs a GPU.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from llmscale.cuda.nvrtc import architecture_of, compile_cubin
from llmscale.cuda.sources import SOURCES, source_of
from llmscale.errors import CudaError
from tests.cuda.emulator import kernel_names
from tools import cuda_build

ARCHITECTURES = [f"sm_{name}" for name in cuda_build.ARCHITECTURES]
# Kernels that do nothing below sm_90.
HOPPER_ONLY = {"kv_copy_bulk"}


@cache
def fatbin(source: str) -> Path:
    try:
        return cuda_build.fatbin(cuda_build.CUDA / "kernels" / f"{source}.cu")
    except cuda_build.BuildError as error:
        if "is not installed" in str(error):
            pytest.skip(str(error))
        raise


def disassembler() -> str:
    package = importlib.util.find_spec("triton")
    if package is None or package.origin is None:
        pytest.skip("triton is not installed, whose wheel has cuobjdump")
    return str(Path(package.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump")


@cache
def machine_code(source: str) -> dict[tuple[str, str], str]:
    """Of every kernel of a file, by architecture and name."""
    done = subprocess.run([disassembler(), "-sass", fatbin(source)], capture_output=True, text=True, check=True)
    found: dict[tuple[str, str], str] = {}
    for image in re.split(r"(?=^\s*code for )", done.stdout, flags=re.MULTILINE):
        architecture = re.search(r"code for (sm_\w+)", image)
        if architecture is None:
            continue
        for body in image.split("Function : ")[1:]:
            found[architecture[1], body.split(maxsplit=1)[0]] = body
    return found


def compiled(*prefixes: str) -> Iterator[tuple[str, str, str]]:
    for source in SOURCES:
        for (architecture, kernel), code in machine_code(source).items():
            if kernel.startswith(prefixes):
                yield architecture, kernel, code


@pytest.mark.parametrize("source", SOURCES)
def test_nvcc_compiles_for_every_architecture_without_warning_and_spill(source: str) -> None:
    log = fatbin(source).with_suffix(".log").read_text(encoding="utf-8")
    kernels = {name for name in kernel_names() if source_of(name) == source}
    properties = re.findall(r"Function properties for (\w+)\n\s+(\d+) bytes stack frame, (\d+) bytes spill stores", log)
    assert len(properties) == len(kernels) * len(ARCHITECTURES)
    assert {name for name, _, _ in properties} == kernels
    assert [entry for entry in properties if entry[1:] != ("0", "0")] == []
    assert "warning" not in log


@pytest.mark.parametrize("source", SOURCES)
def test_the_machine_code_has_every_kernel_for_every_architecture_and_no_local_memory(source: str) -> None:
    code = machine_code(source)
    kernels = {name for name in kernel_names() if source_of(name) == source}
    assert set(code) == {(architecture, kernel) for architecture in ARCHITECTURES for kernel in kernels}
    assert [key for key, body in code.items() if re.search(r"\b(LDL|STL)\b", body)] == []


def test_matmuls_use_tensor_cores_and_copies_of_sixteen_bytes() -> None:
    seen = 0
    for architecture, kernel, body in compiled("w4a16", "w8a16"):
        seen += 1
        where = (architecture, kernel)
        assert "HMMA.16816.F32.BF16" in body, where
        assert "LDSM.16.M88.4" in body, where
        assert re.search(r"LDGSTS\.E\.\S*128", body), where
        assert re.search(r"\bLDS\.128\b", body), where
        # Copies of x, of weights, of scales: nothing narrower comes from device memory in the loop.
        assert not re.search(r"LDGSTS\.E(?!\S*128)\S* ", body), where
    assert seen == 12 * len(ARCHITECTURES)


def test_block_copies_are_sixteen_bytes_wide_or_bulk() -> None:
    for architecture, kernel, body in compiled("kv_copy_loads", "kv_pack", "kv_unpack", "w4_panel", "w8_panel"):
        assert re.search(r"\bLDG\.E\.128", body), (architecture, kernel)
        assert re.search(r"\bSTG\.E\.128", body), (architecture, kernel)
    for architecture, kernel, body in compiled("kv_copy_bulk"):
        hopper = architecture in {"sm_90a", "sm_100a"}
        assert ("UBLKCP" in body) == hopper, (architecture, kernel)
        assert ("SYNCS" in body) == hopper, (architecture, kernel)


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (10, 0)], ids=ARCHITECTURES)
@pytest.mark.parametrize("source", ["kv_copy", "kv_pack", "w8_panel", "w8a16_matmul"])
def test_nvrtc_compiles_the_same_files_with_torchs_wheels_alone(
    source: str, capability: tuple[int, int], tmp_path: Path
) -> None:
    pytest.importorskip("cuda.bindings")
    cubin = compile_cubin(cuda_build.CUDA, source, architecture_of(capability), tmp_path)
    assert cubin.startswith(b"\x7fELF")
    names = [name for name in kernel_names() if source_of(name) == source]
    assert all(name.encode() in cubin for name in names)


def test_an_empty_log_of_nvrtc_is_not_written_into_the_processs_own_bytes(tmp_path: Path) -> None:
    pytest.importorskip("cuda.bindings")
    compile_cubin(cuda_build.CUDA, "kv_pack", "sm_80", tmp_path)
    # Made anew: a constant of this file would be the object that was written to, and equal to itself.
    assert chr(32).encode()[0] == 32


@pytest.mark.parametrize("source", ["w4_panel", "w4a16_matmul"])
def test_what_nvrtc_compiled_is_kept_by_the_hash_of_its_sources(source: str, tmp_path: Path) -> None:
    pytest.importorskip("cuda.bindings")
    first = compile_cubin(cuda_build.CUDA, source, "sm_90a", tmp_path)
    (kept,) = tmp_path.glob("*.cubin")
    kept.write_bytes(b"kept")
    assert compile_cubin(cuda_build.CUDA, source, "sm_90a", tmp_path) == b"kept"
    compile_cubin(cuda_build.CUDA, "kv_copy", "sm_90a", tmp_path)
    assert len(list(tmp_path.glob("*.cubin"))) == 2
    assert first.startswith(b"\x7fELF")


def test_a_cache_that_others_can_write_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("cuda.bindings")
    tmp_path.chmod(0o777)
    with pytest.raises(CudaError, match="others can write"):
        compile_cubin(cuda_build.CUDA, "kv_copy", "sm_90a", tmp_path)


def test_what_nvrtc_refuses_is_told_in_its_words(tmp_path: Path) -> None:
    pytest.importorskip("cuda.bindings")
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "broken.cu").write_text("this is no kernel;\n")
    with pytest.raises(CudaError, match=r"broken\.cu for sm_90a:(.|\n)*expected a declaration"):
        compile_cubin(tmp_path, "broken", "sm_90a", tmp_path / "cache")
