"""That steps can be captured in a CUDA graph: nothing is allocated, nothing read back, no launch depends on lengths.

Launches are recorded and not run; what torch itself is asked to do in between is seen by a dispatch mode. Tiling is a
pure function, so its promises are tested beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton", reason="Triton comes with torch's CUDA wheels for Linux")

from llmscale.layers.ops import KvLayer
from llmscale.layers.triton.ops import OpsLimits, TritonOps
from llmscale.layers.triton.sampler.rows import RowSampling, pack_rows
from llmscale.layers.triton.sampler.sampler import TritonSampler
from llmscale.layers.triton.tiling import AttentionShape, DeviceShape, chunk_tiling, decode_tiling
from tests.triton.attention_cases import Shape, attention_constants
from tests.triton.compiled import MAX_SHARED_BYTES, Launch, recorded
from tests.triton.outcome import Rows, step_rows

CPU = torch.device("cpu")
VIEWS = {"aten.slice.Tensor", "aten.view.default", "aten.select.int", "aten.detach.default", "aten.alias.default"}
H200 = DeviceShape(132, 227 * 1024)


class SeenOperations(TorchDispatchMode):
    """Writes down every operation of torch that is not a view."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if str(func) not in VIEWS:
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def layer_step(rows: Rows, shape: Shape) -> Callable[[], None]:
    """All operations of one layer over `rows`, in memory that is there before."""
    constants = attention_constants(shape, CPU, torch.Generator())
    spec, count = constants.spec, rows.positions.shape[0]
    ops = TritonOps(spec, shape.dtype, OpsLimits(8, 4096), CPU, H200)

    def memory(*size: int) -> Tensor:
        return torch.zeros(*size, dtype=shape.dtype)

    stream, weight, table = memory(count, 64), memory(64), memory(9, 64)
    qkv, query, out = (memory(count, width) for width in (spec.query_size + 2 * spec.kv_size, *[spec.query_size] * 2))
    gate_up, inner = memory(count, 96), memory(count, 48)
    kv = KvLayer(memory(40, 2, 2, spec.kv_heads, shape.block_tokens, spec.head_dim), 1)

    def step() -> None:
        ops.begin_step(rows)
        ops.embed(rows.positions, table, stream)
        ops.rms_norm(stream, weight, 1e-5, stream)
        ops.rotate_and_store(qkv, constants, kv, query)
        ops.attend(query, constants, kv, out)
        ops.add_rms_norm(stream, stream, weight, 1e-5, stream)
        ops.silu_mul(gate_up, inner)

    return step


def launches_of(step: Callable[[], object]) -> tuple[list[Launch], list[str]]:
    with recorded() as launches, SeenOperations() as seen:
        step()
    return launches, seen.names


SHAPE = Shape(64, 4, 32, ())


@pytest.mark.parametrize(
    "spans", [((5, 1), (900, 1), (64, 1)), ((5, 1), (900, 40), (64, 64))], ids=["decodes", "mixed"]
)
def test_a_layer_allocates_nothing_and_reads_nothing_back(spans: tuple[tuple[int, int], ...]) -> None:
    rows = step_rows(spans, SHAPE.block_tokens, 40, CPU, torch.Generator())
    launches, others = launches_of(layer_step(rows, SHAPE))
    assert others == []
    names = {launch.name for launch in launches}
    assert ("chunk_kernel" in names) == (len(spans) < rows.positions.shape[0])


def test_launches_of_a_layer_do_not_depend_on_lengths() -> None:
    rows = step_rows(((5, 1), (6, 1), (7, 1)), SHAPE.block_tokens, 40, CPU, torch.Generator())
    step = layer_step(rows, SHAPE)
    before = [launch.fixed() for launch in launches_of(step)[0]]
    rows.sequence_lengths.copy_(torch.tensor([1000, 1, 0]))
    rows.positions.copy_(torch.tensor([999, 0, 0]))
    rows.query_start.copy_(torch.tensor([0, 1, 2, 2]))
    assert [launch.fixed() for launch in launches_of(step)[0]] == before


def test_sampling_allocates_nothing_and_its_launches_do_not_depend_on_what_rows_ask_for() -> None:
    vocabulary = 5000
    sampler = TritonSampler(vocabulary, 4, CPU)
    rows = pack_rows([RowSampling(seed=row) for row in range(3)], vocabulary, CPU)
    logits = torch.zeros(3, vocabulary)
    launches, others = launches_of(lambda: sampler.sample(logits, rows))
    assert others == []
    assert len(launches) == 10
    rows.top_k.fill_(5)
    rows.temperature.zero_()
    again = launches_of(lambda: sampler.sample(logits, rows))[0]
    assert [launch.fixed() for launch in again] == [launch.fixed() for launch in launches]


def test_handing_ids_on_is_one_launch_whatever_is_named() -> None:
    sampler = TritonSampler(5000, 4, CPU)
    drawn_from, token_ids = torch.zeros(3, dtype=torch.int32), torch.zeros(8, dtype=torch.int32)
    launches, others = launches_of(lambda: sampler.hand_on(drawn_from, token_ids))
    drawn_from.fill_(2)
    again = launches_of(lambda: sampler.hand_on(drawn_from, token_ids))[0]
    assert others == []
    assert len(launches) == 1
    assert [launch.fixed() for launch in again] == [launch.fixed() for launch in launches]


@pytest.mark.parametrize("head_dim", [64, 80, 128, 256])
@pytest.mark.parametrize("element_bytes", [2, 4])
@pytest.mark.parametrize("group", [1, 3, 8, 64, 71])
def test_a_tile_holds_a_row_of_every_group_within_shared_memory(head_dim: int, element_bytes: int, group: int) -> None:
    shape = AttentionShape(group, 1, head_dim, element_bytes)
    for shared_bytes in MAX_SHARED_BYTES.values():
        tiling = chunk_tiling(shape, DeviceShape(100, shared_bytes))
        assert tiling.lines >= group
        assert 2 * decode_tiling(shape, DeviceShape(100, shared_bytes), 4096).tile * shape.key_bytes < shared_bytes // 2


def test_few_long_contexts_are_cut_into_parts_and_many_are_not() -> None:
    tiling = decode_tiling(AttentionShape(32, 8, 128, 2), H200, 131_072)
    assert tiling.parts(1) == 32
    assert tiling.parts(8) == 4
    assert tiling.parts(64) == 1
    assert all(8 * count * tiling.parts(count) <= 3 * H200.processors for count in range(1, 49))


def test_short_contexts_are_not_cut_into_parts_that_cost_more_to_merge() -> None:
    tiling = decode_tiling(AttentionShape(32, 8, 128, 2), H200, 512)
    assert tiling.parts(1) == 2
    assert decode_tiling(AttentionShape(32, 8, 128, 2), H200, 256).parts(1) == 1


def test_operations_refuse_memory_with_gaps() -> None:
    rows = step_rows(((5, 1),), SHAPE.block_tokens, 40, CPU, torch.Generator())
    constants = attention_constants(SHAPE, CPU, torch.Generator())
    ops = TritonOps(constants.spec, torch.float32, OpsLimits(8, 4096), CPU, H200)
    ops.begin_step(rows)
    with pytest.raises(AssertionError, match="contiguous"):
        ops.rms_norm(torch.zeros(4, 8)[:, ::2], torch.zeros(4), 1e-5, torch.zeros(4, 4))
    other = attention_constants(Shape(32, 4, 32, ()), CPU, torch.Generator())
    with pytest.raises(AssertionError, match="built for"):
        ops.attend(torch.zeros(1, 256), other, KvLayer(torch.zeros(4, 1, 2, 2, 32, 32), 0), torch.zeros(1, 256))
