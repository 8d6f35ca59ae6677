"""The GPU benchmark without a GPU: it says so, its sections are fenced, and all of them run on the CPU's operators."""

from __future__ import annotations

import contextlib
import ctypes
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch

from bench import gpu, gpu_attention, gpu_copies, gpu_matmul, gpu_sampling, gpu_serving, gpu_steps, gpu_timing
from bench.gpu_timing import Budget
from bench.result import Row
from bench.statistics import Spread
from llmscale.devices import registry
from llmscale.layers.reference import ReferenceOps
from tests.cuda.emulator import Emulator
from tests.fakes.fake_device.machine import PIECE_NS, SCRIPT, Script

HEADS = gpu_attention.Heads(query=4, kv=2, dim=16)
ROOT = Path(__file__).parents[3]
# The first test with the emulation may have to compile it.
pytestmark = pytest.mark.timeout(900)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_it_says_so_and_ends_with_a_status_of_its_own() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "bench", "gpu"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT / 'python'}:{ROOT}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == os.EX_UNAVAILABLE
    assert done.stderr.startswith("NoCudaDevice: no CUDA device")


def row(case: str) -> Row:
    return Row(case, 1, "us", 1, 1, 1)


def test_a_section_that_fails_keeps_its_rows_and_says_why() -> None:
    def broken(budget: Budget, limits: dict[str, float]) -> Iterator[Row]:
        yield row("first")
        raise AssertionError("wrong by 3")

    rows = gpu.run_section("broken", broken, {}, 60)
    assert [found.case for found in rows] == ["first", "broken/failed"]
    assert rows[1].peers == {"error": "AssertionError: wrong by 3"}


def test_a_section_without_time_says_how_many_cases_are_missing() -> None:
    def slow(budget: Budget, limits: dict[str, float]) -> Iterator[Row]:
        for case in ("first", "second"):
            if budget.allows():
                yield row(case)

    (left_out,) = gpu.run_section("slow", slow, {}, 0)
    assert (left_out.case, left_out.value) == ("slow/left-out", 2)


class Engine(Emulator):
    def copy_batch(self, targets: Sequence[int], sources: Sequence[int], sizes: Sequence[int]) -> None:
        for target, source, size in zip(targets, sources, sizes, strict=True):
            ctypes.memmove(target, source, size)


@pytest.fixture
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """No streams, no graphs, every time is 2 us; operators are the CPU's, block copies the emulation's."""

    def once(calls: Sequence[Callable[[], object]], rounds: int | None = None) -> Spread:
        calls[0]()
        return Spread(2.0, 1.0, 4.0, 3)

    for module in (gpu_matmul, gpu_copies, gpu_attention, gpu_sampling):
        monkeypatch.setattr(module, "DEVICE", torch.device("cpu"))
    for module in (gpu_matmul, gpu_copies):
        monkeypatch.setattr(module, "cuda_device", lambda index: Engine())
    for module in (gpu_matmul, gpu_attention, gpu_sampling):
        monkeypatch.setattr(module, "graph_microseconds", once)
        monkeypatch.setattr(module, "ROTATING_BYTES", 1)
    # Peers are fenced where they are timed.
    monkeypatch.setattr(gpu_timing, "graph_microseconds", once)
    monkeypatch.setattr(gpu_matmul, "SHAPES", ((136, 264),))
    monkeypatch.setattr(gpu_attention, "MODELS", (HEADS,))
    monkeypatch.setattr(gpu_attention, "make_ops", lambda attention, max_sequences, max_tokens: ReferenceOps())
    monkeypatch.setattr(gpu_attention, "DECODES", ((3, 40),))
    monkeypatch.setattr(gpu_attention, "CHUNKS", ((20, 20), (8, 70)))
    monkeypatch.setattr(gpu_sampling, "VOCABULARY", 100)
    monkeypatch.setattr(gpu_sampling, "make_sampler", lambda rows: torch.argmax)
    monkeypatch.setattr(gpu_copies, "stream_microseconds", lambda call, stream, repeats=5: once([call]))
    monkeypatch.setattr(gpu_copies, "elapsed_microseconds", lambda call, stream: once([call]).median)
    monkeypatch.setattr(gpu_copies, "new_stream", lambda: None)
    monkeypatch.setattr(gpu_copies, "on_stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(gpu_copies, "pinned", lambda *shape: torch.empty(shape, dtype=torch.uint8))
    monkeypatch.setattr(gpu_copies, "synchronize", lambda: None)
    monkeypatch.setattr(gpu_copies, "REGION_BYTES", 128 << 10)
    monkeypatch.setattr(gpu_copies, "BLOCK_BYTES", (8 << 10, 32 << 10))
    monkeypatch.setattr(gpu_copies, "SIDE", 64)


@pytest.mark.usefixtures("on_the_cpu")
def test_matmul_sections_cover_every_batch_with_rates_of_what_they_move() -> None:
    limits = {"copy_gigabytes_per_second": 100.0, "bf16_teraflops": 10.0}
    rows = {found.case: found for found in gpu_matmul.int4_rates(Budget(900), limits)}
    assert list(rows) == [f"int4/{batch}x136x264" for batch in gpu_matmul.BATCHES]
    packed_bytes = 136 * 264 // 2 + 2 * 136 * 264 // 128
    assert rows["int4/1x136x264"].value == pytest.approx(packed_bytes / 2e-6 / 1e9)
    assert rows["int4/1x136x264"].low < rows["int4/1x136x264"].value < rows["int4/1x136x264"].high
    assert rows["int4/1x136x264"].limit_share == pytest.approx(packed_bytes / 2e-6 / 1e9 / 100)
    assert rows["int4/256x136x264"].value == pytest.approx(2 * 256 * 136 * 264 / 2e-6 / 1e12)
    assert len(list(gpu_matmul.e4m3_rates(Budget(900), limits))) == 5


def test_a_peer_that_cannot_run_says_why_and_costs_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(calls: Sequence[Callable[[], object]], rounds: int | None = None) -> Spread:
        raise RuntimeError("no such product below sm_89\nat some line")

    monkeypatch.setattr(gpu_timing, "graph_microseconds", broken)
    assert gpu_timing.peer_microseconds([list]) == "no such product below sm_89"


@pytest.mark.usefixtures("on_the_cpu")
def test_correctness_finds_a_wrong_product(monkeypatch: pytest.MonkeyPatch) -> None:
    cases = gpu_matmul.correctness(Budget(900))
    assert next(cases).value < gpu_matmul.MAX_RELATIVE_ERROR
    assert next(cases).value < gpu_matmul.MAX_RELATIVE_ERROR
    right = gpu_matmul.multiply_int4
    monkeypatch.setattr(gpu_matmul, "multiply_int4", lambda x, matrix, workspace: right(x, matrix, workspace) * 1.01)
    with pytest.raises(AssertionError, match="relative error"):
        next(cases)


@pytest.mark.usefixtures("on_the_cpu")
def test_copy_sections_move_blocks_in_both_directions() -> None:
    cases = [found.case for found in gpu_copies.copy_rates(Budget(900), {})]
    ways = ("engine", "kernel2", "kernel4", "kernel8")
    for direction in ("host_to_device", "device_to_host"):
        assert [f"copy/{direction}/8KiB/{way}" for way in ways] == [
            case for case in cases if case.startswith(f"copy/{direction}/8KiB")
        ]
        assert f"copy/{direction}/32KiB/engine/slowdown" in cases


@pytest.mark.usefixtures("on_the_cpu")
def test_attention_sections_count_keys_that_are_read_and_pairs_that_are_multiplied() -> None:
    limits = {"copy_gigabytes_per_second": 100.0, "bf16_teraflops": 10.0}
    (decode,) = gpu_attention.decode_rates(Budget(900), limits)
    assert decode.case == "decode/4q2kv16/3x40"
    kv_bytes = 3 * 40 * 2 * 2 * 16 * 2
    assert decode.value == pytest.approx(kv_bytes / 2e-6 / 1e9)
    assert decode.limit_share == pytest.approx(kv_bytes / 2e-6 / 1e9 / 100)
    alone, behind = gpu_attention.chunk_rates(Budget(900), limits)
    pairs = sum(range(1, 21)), sum(range(63, 71))
    assert [alone.value, behind.value] == [pytest.approx(4 * 4 * 16 * each / 2e-6 / 1e12) for each in pairs]
    (first, *_, last) = gpu_sampling.sampling_rates(Budget(900), limits)
    assert (first.case, last.case) == ("sampling/1x100", "sampling/256x100")
    assert last.value == pytest.approx(2 * 256 * 100 / 2e-6 / 1e9)


@pytest.mark.usefixtures("on_the_cpu")
def test_attention_is_held_against_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    cases = [found.case for found in gpu_attention.correctness(Budget(900))]
    assert cases == ["correct/attention/4q2kv16/decode", "correct/attention/4q2kv16/mixed"]
    right = gpu_attention.gathered
    monkeypatch.setattr(gpu_attention, "gathered", lambda *given: right(*given).flip(1))
    with pytest.raises(AssertionError, match="relative error"):
        next(gpu_attention.correctness(Budget(900)))


@pytest.fixture
def steps_of_a_tiny_model(monkeypatch: pytest.MonkeyPatch) -> Script:
    """On the fake device, whose clock counts pieces of work."""
    monkeypatch.setitem(registry.DEVICES, "cpu", "tests.fakes.fake_device.device")
    # Products of 4-bit weights allocate on a CPU.
    for name, value in {"strict": False, "broken": [], "free_bytes": 8 << 30, "max_graphs": 64}.items():
        monkeypatch.setattr(SCRIPT, name, value)
    for name, value in {"DEVICE_NAME": "cpu", "MODELS": ("tiny",), "BATCHES": (1, 3), "CONTEXT_TOKENS": 40}.items():
        monkeypatch.setattr(gpu_steps, name, value)
    return SCRIPT


def test_whole_steps_stand_against_the_bytes_that_they_move(steps_of_a_tiny_model: Script) -> None:
    limits = {"copy_gigabytes_per_second": 100.0}
    rows = {found.case: found for found in gpu_steps.step_rates(Budget(600), limits)}
    assert list(rows) == [
        f"steps/tiny/{kind}/{batch}/{way}"
        for kind in ("int4-128", "bf16")
        for batch in (3, 1)
        for way in ("eager", "graph")
    ]
    # Two layers of 64: four projections of attention with half as many heads for keys and values, three of the MLP.
    projections = 2 * (64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 128)
    others = 2 * (32_000 * 64 + 5 * 64)
    kv = 3 * 41 * 2 * 2 * 32 * 2
    moved = {"bf16": 2 * projections + others + kv, "int4-128": projections // 2 + projections // 64 + others + kv}
    for kind, expected in moved.items():
        row = rows[f"steps/tiny/{kind}/3/graph"]
        assert row.peers["gigabytes"] == pytest.approx(expected / 1e9)
        assert row.value == pytest.approx(PIECE_NS / 1e6, rel=0.2), "a step is one piece of work"
        assert row.limit_share == pytest.approx(expected / row.value / 1e6 / 100)
        assert row.peers["times its bytes at the copy rate"] == pytest.approx(1 / row.limit_share)
    assert steps_of_a_tiny_model.broken == []


def test_batches_without_room_are_left_out_and_said(steps_of_a_tiny_model: Script) -> None:
    steps_of_a_tiny_model.free_bytes = gpu_steps.SPARE_BYTES + 5 * 2 * 2 * 32 * 32 * 2
    rows = gpu.run_section("steps", gpu_steps.step_rates, {}, 600)
    assert [found.case for found in rows if "graph" in found.case] == [
        "steps/tiny/int4-128/1/graph",
        "steps/tiny/bf16/1/graph",
    ]
    assert (rows[-1].case, rows[-1].value) == ("steps/left-out", 2)
    assert all(found.limit_share is None for found in rows)


def test_serving_stands_beside_vllm_where_there_is_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LLMSCALE_BENCH_CACHE", str(tmp_path))
    for name, value in {"SHAPE": "tiny", "STREAMS": (1, 2), "PROMPT_TOKENS": 8, "OUTPUT_TOKENS": 4}.items():
        monkeypatch.setattr(gpu_serving, name, value)
    monkeypatch.setattr(gpu_serving.shutil, "which", lambda program: None)
    alone = list(gpu_serving.serving_rates(Budget(600), {}))
    assert [found.case for found in alone] == ["serving/tiny/1-streams", "serving/tiny/2-streams"]
    assert all(found.value > 0 and found.peers == {"vllm": "not on the PATH"} for found in alone)
    monkeypatch.setattr(gpu_serving.shutil, "which", lambda program: program)
    monkeypatch.setattr(gpu_serving, "_vllm", lambda program, folder: gpu_serving._own(folder))
    beside = list(gpu_serving.serving_rates(Budget(600), {}))
    assert all(isinstance(found.peers["vllm"], float) for found in beside)
