"""The Triton kernels on a device: the cases of the interpreter, bfloat16 at full size, and captured decode steps."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton comes with torch's CUDA wheels for Linux")

from llmscale.layers.ops import KvLayer
from llmscale.layers.reference import ReferenceOps
from llmscale.layers.triton.ops import OpsLimits, TritonOps
from llmscale.layers.triton.sampler.rows import RowSampling, pack_rows
from llmscale.layers.triton.sampler.sampler import TritonSampler
from tests.triton.attention_cases import TOLERANCE, Shape, attention_case, attention_constants
from tests.triton.outcome import Case, poisoned, require_close, require_same, step_rows
from tests.triton.run_cases import FAMILIES

pytestmark = pytest.mark.gpu

CASES: dict[str, Case] = {
    name: case for family in FAMILIES for name, case in importlib.import_module(f"tests.triton.{family}").CASES.items()
}
FULL_SIZES = {
    f"{head_dim}_group_{group}_{name}": Shape(
        head_dim, group, 32, spans, kv_heads=8, window=window, dtype=torch.bfloat16, processors=132, norms=True
    )
    for head_dim in (64, 80, 128)
    for group in (1, 4, 7)
    for name, spans, window in (
        ("decodes", tuple((1 + 61 * sequence, 1) for sequence in range(32)), None),
        ("long", ((2000, 1), (1500, 1)), None),
        ("mixture", ((1000, 1), (1, 1), (1900, 700), (513, 513), (33, 2)), None),
        ("windowed", ((1000, 1), (1900, 700), (513, 513)), 300),
    )
}


@pytest.fixture
def device() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return torch.device("cuda")


@pytest.mark.parametrize("case", CASES)
def test_kernels_agree_with_their_oracle(case: str, device: torch.device) -> None:
    CASES[case](device)


@pytest.mark.parametrize("name", FULL_SIZES)
def test_bfloat16_attention_agrees_with_the_reference(name: str, device: torch.device) -> None:
    attention_case(FULL_SIZES[name], seed=len(name))(device)


def captured(step: object, device: torch.device) -> torch.cuda.CUDAGraph:
    """The step as a graph; it is run once before, so that kernels are compiled and loaded."""
    assert callable(step)
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph


def test_a_captured_step_of_decodes_follows_lengths_and_absent_sequences(device: torch.device) -> None:
    dtype, blocks = torch.float16, 300
    shape = Shape(128, 4, 32, (), kv_heads=8, dtype=dtype)
    generator = torch.Generator().manual_seed(2)
    constants = attention_constants(shape, device, generator)
    spec = constants.spec
    longest = 1500
    rows = step_rows(tuple((longest, 1) for _ in range(4)), 32, blocks, device, generator)
    region = torch.randn(blocks, 2, 2, 8, 32, 128, generator=generator).to(dtype).to(device)
    query = torch.randn(4, spec.query_size, generator=generator).to(dtype).to(device)
    out = poisoned(4, spec.query_size, dtype=dtype, device=device)
    ops = TritonOps(spec, dtype, OpsLimits(8, 2048), device)
    ops.begin_step(rows)
    graph = captured(lambda: ops.attend(query, constants, KvLayer(region, 1), out), device)

    oracle = ReferenceOps()
    for lengths in ((1, 700, 1500), (33, 1024, 64)):
        rows.sequence_lengths.copy_(torch.tensor([*lengths, 0]))
        rows.positions.copy_(torch.tensor([*(length - 1 for length in lengths), 0]))
        rows.query_start.copy_(torch.tensor([0, 1, 2, 3, 3]))
        out.fill_(float("nan"))
        graph.replay()
        present = type(rows)(
            rows.positions[:3], rows.slot_mapping[:3], rows.query_start[:4], rows.sequence_lengths[:3],
            rows.table_offsets[:3], rows.block_tables,
        )  # fmt: skip
        oracle.begin_step(present)
        expected = poisoned(3, spec.query_size, dtype=torch.float32, device=device)
        oracle.attend(query[:3].float(), constants, KvLayer(region, 1), expected)
        require_close("captured attention", out[:3], expected, TOLERANCE[dtype])
        assert bool(out[3].isnan().all()), "an absent sequence was written"


def test_captured_sampling_follows_its_columns(device: torch.device) -> None:
    vocabulary, count = 128_256, 16
    sampler = TritonSampler(vocabulary, count, device)
    logits = torch.randn(count, vocabulary, device=device) * 3
    rows = pack_rows([RowSampling(seed=row) for row in range(count)], vocabulary, device)
    graph = captured(lambda: sampler.sample(logits, rows), device)
    for changes in ({}, {"top_k": 40, "top_p": 0.9}, {"temperature": 0.0}):
        wanted = pack_rows([RowSampling(seed=99 + row, **changes) for row in range(count)], vocabulary, device)
        for name in ("temperature", "top_k", "top_p", "seed_low", "seed_high"):
            getattr(rows, name).copy_(getattr(wanted, name))
        graph.replay()
        tokens: Tensor = sampler.sample(logits, rows).tokens.clone()
        graph.replay()
        fresh = TritonSampler(vocabulary, count, device).sample(logits, wanted)
        require_same("tokens", tokens, fresh.tokens)
