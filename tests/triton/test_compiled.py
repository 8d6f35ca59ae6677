"""Every Triton kernel compiled ahead of time as it is launched: wide loads, tensor cores, no spills, shared memory.

The launches are those of a model shaped like Llama 3 8B in bfloat16 and of a sampler over its vocabulary, recorded with
small tensors. Ptxas assembles for the real architecture; Triton itself does not compare shared memory with what an
architecture has. No device is needed.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton comes with torch's CUDA wheels for Linux")

from llmscale.layers.ops import KvLayer
from llmscale.layers.triton.ops import OpsLimits, TritonOps
from llmscale.layers.triton.sampler.rows import RowSampling, pack_rows
from llmscale.layers.triton.sampler.sampler import TritonSampler
from llmscale.layers.triton.tiling import DeviceShape
from tests.triton.attention_cases import Shape, attention_constants
from tests.triton.compiled import MAX_SHARED_BYTES, Launch, compiled, machine_code, recorded, stack_bytes
from tests.triton.outcome import step_rows

CPU = torch.device("cpu")
PROCESSORS = {80: 108, 89: 142, 90: 132, 100: 148}
HIDDEN, INNER, VOCABULARY = 4096, 14_336, 128_256
ATTENTION = {"decode_kernel", "chunk_kernel", "merge_kernel", "rotate_and_store_kernel"}
WIDE_LOADS = ATTENTION | {
    "embed_kernel",
    "rms_norm_kernel",
    "silu_mul_kernel",
    "copy_kernel",
    "maxima_kernel",
    "count_kernel",
    "gather_kernel",
    "race_kernel",
}
"""Kernels whose time is that of their reads."""
TENSOR_CORES = {80: "HMMA", 89: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}


@pytest.fixture(autouse=True, scope="module")
def _cubins_of_their_own(tmp_path_factory: pytest.TempPathFactory) -> object:
    """A cache of this run alone, so that what is looked at was compiled by it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("cubins")))
        yield


@cache
def launches(capability: int, dtype: torch.dtype = torch.bfloat16, head_dim: int = 128) -> dict[str, Launch]:
    """One launch of every kernel, by name; of the norm the one with a residual."""
    shape = Shape(head_dim, 4, 32, ((5, 1), (7, 1), (40, 38)), kv_heads=8, dtype=dtype, norms=True)
    device = DeviceShape(PROCESSORS[capability], MAX_SHARED_BYTES[capability])
    generator = torch.Generator()
    constants = attention_constants(shape, CPU, generator)
    spec = constants.spec
    rows = step_rows(shape.spans, shape.block_tokens, 8, CPU, generator)
    count = rows.positions.shape[0]

    def memory(*size: int) -> Tensor:
        return torch.empty(*size, dtype=dtype)

    with recorded() as found:
        ops = TritonOps(spec, dtype, OpsLimits(4, 8192), CPU, device)
        ops.begin_step(rows)
        ops.embed(rows.positions, memory(50, HIDDEN), memory(count, HIDDEN))
        stream = memory(count, HIDDEN)
        ops.rms_norm(stream, memory(HIDDEN), 1e-5, stream)
        ops.add_rms_norm(stream, stream, memory(HIDDEN), 1e-5, stream)
        kv = KvLayer(memory(8, 2, 2, 8, shape.block_tokens, head_dim), 1)
        query = memory(count, spec.query_size)
        ops.rotate_and_store(memory(count, spec.query_size + 2 * spec.kv_size), constants, kv, query)
        ops.attend(query, constants, kv, query)
        ops.silu_mul(memory(count, 2 * INNER), memory(count, INNER))
        rows_to_sample = pack_rows([RowSampling()] * 2, VOCABULARY, CPU)
        sampler = TritonSampler(VOCABULARY, 2, CPU)
        sampler.hand_on(rows.sequence_lengths, rows.positions)
        sampler.sample(memory(2, VOCABULARY), rows_to_sample)
    return {launch.name: launch for launch in found}


NAMES = sorted(launches(90))
SMALL = {"bound_kernel", "change_kernel", "count_kernel", "finish_kernel", "gather_kernel", "maxima_kernel"} | {
    "embed_kernel",
    "hand_on_kernel",
    "most_likely_kernel",
}
"""Kernels with little to go wrong; they are compiled with the slow tests."""


def check(launch: Launch, capability: int, folder: Path) -> None:
    kernel = compiled(launch, capability)
    code = machine_code(kernel, folder)
    assert kernel.metadata.shared <= MAX_SHARED_BYTES[capability] - 1024
    spills = re.findall(r"\b(?:LDL|STL)\b", code)
    assert not spills, f"{len(spills)} loads and stores of spilled registers, {stack_bytes(kernel, folder)} bytes"
    if launch.name in WIDE_LOADS:
        assert re.search(r"\bLDG(?:STS)?\.E\.(?:\w+\.)*128\b", code), "no load of 16 bytes"
        assert not re.search(r"\bLDG\.E\.U(?:16|8)\b", code), "a load of 2 bytes or 1"
    if launch.name in {"decode_kernel", "chunk_kernel"}:
        # 16 lines of a decode are too few for the wide instructions of later architectures.
        wanted = TENSOR_CORES[capability] if launch.name == "chunk_kernel" else "HMMA"
        assert re.search(rf"\b{wanted}\b", code), f"no {wanted}"


@pytest.mark.parametrize("name", sorted(set(NAMES) - SMALL))
def test_kernels_are_compiled_well_for_hopper(name: str, tmp_path: Path) -> None:
    check(launches(90)[name], 90, tmp_path)


# The tightest shared memory, and the kernel that every token of an answer waits for.
MOST_AT_RISK = {("chunk_kernel", 89), ("decode_kernel", 80), ("decode_kernel", 100)}
ALL = [(name, capability) for capability in PROCESSORS for name in NAMES]
REST = [each for each in ALL if each not in MOST_AT_RISK and (each[1] != 90 or each[0] in SMALL)]


@pytest.mark.parametrize(("name", "capability"), sorted(MOST_AT_RISK))
def test_attention_is_compiled_well_for_other_architectures(name: str, capability: int, tmp_path: Path) -> None:
    check(launches(capability)[name], capability, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "capability"), REST)
def test_every_kernel_is_compiled_well_for_every_architecture(name: str, capability: int, tmp_path: Path) -> None:
    check(launches(capability)[name], capability, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("capability", MAX_SHARED_BYTES)
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_attention_of_any_head_size_fits_shared_memory(capability: int, head_dim: int, dtype: torch.dtype) -> None:
    for name in ("decode_kernel", "chunk_kernel"):
        kernel = compiled(launches(capability, dtype, head_dim)[name], capability)
        assert kernel.metadata.shared <= MAX_SHARED_BYTES[capability] - 1024, name


def test_recorded_launches_without_alignment_have_narrow_loads(tmp_path: Path) -> None:
    """What the other tests look for is not there when nothing is known of the addresses."""
    launch = launches(90)["rms_norm_kernel"]
    code = machine_code(compiled(launch, 90, aligned=False), tmp_path)
    assert not re.search(r"\bLDG(?:STS)?\.E\.(?:\w+\.)*128\b", code)
