"""Goal: the KV cache is as large as what the device has free after the largest step, and too small a one is refused."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from llmscale import SamplingParams
from llmscale.devices.interface import MemoryFigures
from llmscale.errors import ConfigError
from llmscale.worker.device_start import MIN_MARGIN_BYTES, blocks_within, profiled_step
from llmscale.worker.kv_layout import KvLayout
from llmscale.worker.step import StepLimits
from tests.devices.conftest import MakeFake
from tests.fakes.fake_device.machine import Script

LAYOUT = KvLayout(layers=2, kv_heads=4, head_dim=64, block_tokens=32, dtype="bfloat16")
LIMITS = StepLimits(max_step_tokens=96, max_sequences=12, max_sequence_tokens=320)
GIB = 1 << 30


def test_what_is_free_less_two_steps_and_a_margin_becomes_blocks() -> None:
    figures = MemoryFigures(free_bytes=60 * GIB, total_bytes=64 * GIB)
    room = 60 * GIB - 2 * GIB - 2 * GIB
    assert blocks_within(figures, GIB, LAYOUT, LIMITS, most=1 << 30) == room // LAYOUT.block_bytes
    assert blocks_within(figures, GIB, LAYOUT, LIMITS, most=500) == 500
    small = MemoryFigures(free_bytes=GIB, total_bytes=GIB)
    assert blocks_within(small, 0, LAYOUT, LIMITS, most=1 << 30) == (GIB - MIN_MARGIN_BYTES) // LAYOUT.block_bytes


def test_too_little_for_one_sequence_is_refused_with_all_figures_and_just_enough_is_not() -> None:
    enough = MIN_MARGIN_BYTES + 10 * LAYOUT.block_bytes
    assert blocks_within(MemoryFigures(enough, GIB), 0, LAYOUT, LIMITS, most=100) == 10
    with pytest.raises(ConfigError, match=r"leaves 9 blocks.*max_sequence_tokens = 320 needs 10.*--max-model-len"):
        blocks_within(MemoryFigures(enough - 1, GIB), 0, LAYOUT, LIMITS, most=100)
    with pytest.raises(ConfigError, match="leaves 0 blocks"):
        blocks_within(MemoryFigures(0, GIB), 0, LAYOUT, LIMITS, most=100)


@pytest.mark.parametrize(("rows", "sequences", "longest"), [(96, 12, 320), (100, 3, 32), (7, 12, 4), (64, 1, 16)])
def test_the_measured_step_is_the_largest_that_limits_allow(rows: int, sequences: int, longest: int) -> None:
    step, blocks = profiled_step(StepLimits(rows, sequences, longest), 8, torch.device("cpu"))
    starts, lengths = step.query_start.tolist(), step.sequence_lengths.tolist()
    assert step.rows == starts[-1] == min(rows, sequences * longest)
    assert [last - first for first, last in pairwise(starts)] == lengths
    assert max(lengths) <= longest
    assert step.samples == min(sequences, step.rows) == len(step.sample_rows)
    assert len(set(step.slot_mapping.tolist())) == step.rows
    assert max(step.slot_mapping.tolist()) < blocks * 8
    for index, first in enumerate(starts[:-1]):
        table = step.table_offsets[index]
        slots = step.slot_mapping[first : first + lengths[index]]
        assert (step.block_tables[table + step.positions[first : first + lengths[index]] // 8] == slots // 8).all()


def test_an_offline_worker_has_the_blocks_that_its_device_has_room_for(make_fake: MakeFake, script: Script) -> None:
    block_bytes = 2 * 6 * 4 * 32 * 32 * 4
    script.free_bytes = MIN_MARGIN_BYTES + 2 * script.step_bytes + 70 * block_bytes
    llm = make_fake()
    assert llm._replica.load()[3] == 70
    assert len(llm.generate("Once", SamplingParams(max_tokens=4, ignore_eos=True))[0].outputs[0].token_ids) == 4


def test_an_offline_worker_without_room_is_not_made(make_fake: MakeFake, script: Script) -> None:
    script.free_bytes = MIN_MARGIN_BYTES
    with pytest.raises(ConfigError, match="leaves 0 blocks"):
        make_fake()
