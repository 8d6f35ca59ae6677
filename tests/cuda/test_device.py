"""A device without a device: images, functions and launches through a driver that records what it is asked for."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from llmscale.cuda.block_copier import BlockCopier, Regions
from llmscale.cuda.copy_choice import CopyMethod
from llmscale.cuda.device import CudaDevice, cuda_device
from llmscale.cuda.driver import Function, ImageRefused, Module
from llmscale.cuda.images import ImageFolder
from llmscale.cuda.launch import Launch, int32s
from llmscale.cuda.sources import source_digest, source_folder
from llmscale.errors import CudaError, NoCudaDevice
from tests.cuda.emulator import HOPPER, Emulator
from tools import cuda_build


class RecordingDriver:
    """Answers with the content of images and the names of kernels."""

    def __init__(self, *, refuses: bytes = b"?") -> None:
        self.refuses = refuses
        self.calls: list[tuple[object, ...]] = []

    def load_image(self, image: bytes) -> Module:
        if image.startswith(self.refuses):
            raise ImageRefused("no")
        self.calls.append(("load", image[:4]))
        return Module(image)

    def function(self, module: Module, name: str) -> Function:
        self.calls.append(("function", name))
        return Function(name)

    def allow_shared_bytes(self, function: Function, shared_bytes: int) -> None:
        self.calls.append(("allow", function, shared_bytes))

    def launch(
        self, function: Function, grid: tuple[int, int, int], threads: int, shared_bytes: int, stream: int, values: int
    ) -> None:
        first = ctypes.c_int32.from_address(ctypes.c_void_p.from_address(values).value or 0).value
        self.calls.append(("launch", function, grid, threads, shared_bytes, stream, first))

    def copy_batch(self, targets: Sequence[int], sources: Sequence[int], sizes: Sequence[int], stream: int) -> None:
        self.calls.append(("copy", list(targets), list(sources), list(sizes), stream))


@pytest.fixture
def packaged(tmp_path: Path) -> Path:
    """An installation with fatbins that fit its sources."""
    folder = tmp_path / "images"
    (folder / "source" / "kernels").mkdir(parents=True)
    (folder / "source" / "include").mkdir()
    (folder / "source" / "kernels" / "kv_copy.cu").write_text('extern "C" __global__ void kv_copy_bulk() {}\n')
    (folder / "kv_copy.fatbin").write_bytes(b"fatbin")
    manifest = {"architectures": ["80"], "nvcc": "13.0.88", "source_digest": source_digest(folder / "source")}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def device(driver: RecordingDriver, packaged: Path, monkeypatch: pytest.MonkeyPatch) -> CudaDevice:
    made = CudaDevice(0, HOPPER, driver, ImageFolder(packaged, packaged / "no checkout", packaged / "cache"))
    monkeypatch.setattr(made, "_stream", lambda: 7)
    return made


def test_a_kernel_is_loaded_once_and_asks_for_its_memory_once(packaged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = RecordingDriver()
    kernels = device(driver, packaged, monkeypatch)
    launch = Launch("kv_copy_bulk", (3, 1, 1), 32, 100_000, int32s(42))
    kernels.launch(launch)
    kernels.launch(launch)
    started = ("launch", "kv_copy_bulk", (3, 1, 1), 32, 100_000, 7, 42)
    assert driver.calls == [
        ("load", b"fatb"),
        ("function", "kv_copy_bulk"),
        ("allow", "kv_copy_bulk", 100_000),
        started,
        started,
    ]


def test_a_fatbin_that_the_driver_refuses_is_compiled_on_the_spot(
    packaged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("cuda.bindings")
    driver = RecordingDriver(refuses=b"fatbin")
    device(driver, packaged, monkeypatch).launch(Launch("kv_copy_bulk", (1, 1, 1), 32, 0, int32s(0)))
    assert driver.calls[0] == ("load", b"\x7fELF")


def test_a_fatbin_of_other_sources_is_not_used(packaged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("cuda.bindings")
    with (packaged / "source" / "kernels" / "kv_copy.cu").open("a") as file:
        file.write("// edited\n")
    driver = RecordingDriver()
    device(driver, packaged, monkeypatch).launch(Launch("kv_copy_bulk", (1, 1, 1), 32, 0, int32s(0)))
    assert driver.calls[0] == ("load", b"\x7fELF")


def test_without_sources_and_images_the_error_says_how_to_get_them(tmp_path: Path) -> None:
    with pytest.raises(CudaError, match="make cuda"):
        source_folder(tmp_path, tmp_path)
    assert source_folder(tmp_path) == cuda_build.CUDA


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_the_error_says_so() -> None:
    with pytest.raises(NoCudaDevice, match="no CUDA device"):
        cuda_device(0)


class EmulatedEngine(Emulator):
    """The emulation with a copy engine."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[int] = []

    def copy_batch(self, targets: Sequence[int], sources: Sequence[int], sizes: Sequence[int]) -> None:
        self.batches.append(len(sizes))
        for target, source, size in zip(targets, sources, sizes, strict=True):
            ctypes.memmove(target, source, size)


def test_a_copier_uses_the_engine_until_it_knows_that_the_kernel_is_faster() -> None:
    source = torch.arange(128 * 16, dtype=torch.int16).view(128, 16)
    regions = Regions(source, torch.zeros_like(source))
    engine = EmulatedEngine()
    copier = BlockCopier(engine, torch.device("cpu"))
    assert copier.copy(regions, [], []) is None
    assert copier.copy(regions, [3, 4, 9], [7, 8, 0]) is CopyMethod.ENGINE
    assert engine.batches == [2]
    assert torch.equal(regions.target[[7, 8, 0]], source[[3, 4, 9]])

    # On this machine a run costs an engine 1 us, and a kernel 3 us whatever it does.
    def elapsed_ns(start) -> int:
        before = len(engine.launches)
        start()
        return 3_000 if len(engine.launches) > before else 1_000 * engine.batches[-1]

    copier.calibrate(regions, elapsed_ns)
    regions.target.zero_()
    assert copier.copy(regions, [3, 4], [7, 8]) is CopyMethod.ENGINE
    scattered = list(range(0, 20, 2))
    assert copier.copy(regions, scattered, scattered) is CopyMethod.KERNEL
    assert torch.equal(regions.target[scattered], source[scattered])


def test_a_calibration_without_time_measures_few_counts_of_both_ways_and_chooses_by_them() -> None:
    regions = Regions(torch.zeros(128, 16, dtype=torch.int16), torch.zeros(128, 16, dtype=torch.int16))
    engine = EmulatedEngine()
    copier = BlockCopier(engine, torch.device("cpu"))
    assert copier.summary(32) == "engine"
    measured: list[int] = []

    def elapsed_ns(start) -> int:
        before = len(engine.launches)
        start()
        measured.append(len(engine.launches) - before)
        return 3_000 if measured[-1] else 1_000 * engine.batches[-1]

    copier.calibrate(regions, elapsed_ns, lambda: False)
    assert len(measured) == 8 * 5, "one and four blocks, together and apart, by both ways, five times each"
    assert sum(measured) == len(measured) // 2
    assert copier.summary(32) == "engine, kernel for 64 blocks"


@pytest.mark.parametrize(("sources", "targets"), [([128], [0]), ([0], [128]), ([127, 128], [3, 4])])
def test_a_copier_refuses_blocks_outside_of_its_regions(sources: list[int], targets: list[int]) -> None:
    source = torch.zeros(128, 16, dtype=torch.int16)
    copier = BlockCopier(EmulatedEngine(), torch.device("cpu"))
    with pytest.raises(AssertionError):
        copier.copy(Regions(source, torch.zeros_like(source)), sources, targets)
