"""The KV region: shape, budget, and memory that must be free when it is made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from llmscale import machine
from llmscale._core import CpuKernels, NativeProgram, ProgramBuilder
from llmscale.errors import ConfigError
from llmscale.models.registry import describe_model
from llmscale.worker import native_runner
from llmscale.worker.kv_region import KvRegion, kv_layout
from llmscale.worker.step import StepLimits
from tests.models_support import NativeExecutor, write_config, write_tiny_model


def test_a_block_is_one_contiguous_piece_of_all_layers(tmp_path: Path) -> None:
    write_config(tmp_path)
    layout = kv_layout(describe_model(tmp_path).spec, torch.bfloat16)
    region = KvRegion(layout, blocks=5)
    assert tuple(region.tensor.shape) == (5, 2, 2, 1, 32, 8)
    assert region.tensor.is_contiguous()
    assert region.tensor[0].nbytes == layout.block_bytes == 2 * 2 * 1 * 32 * 8 * 2
    assert int(region.tensor.count_nonzero()) == 0


def test_a_layer_sees_its_part_of_every_block(tmp_path: Path) -> None:
    write_config(tmp_path)
    region = KvRegion(kv_layout(describe_model(tmp_path).spec, torch.float32), blocks=3)
    region.layer(1).view().fill_(1.0)
    assert int(region.tensor[:, 0].count_nonzero()) == 0
    assert bool((region.tensor[:, 1] == 1).all())


def test_a_budget_is_filled_and_must_hold_the_longest_sequence(tmp_path: Path) -> None:
    write_config(tmp_path)
    layout = kv_layout(describe_model(tmp_path).spec, torch.float32, block_tokens=16)
    assert layout.blocks_within(10 * layout.block_bytes + layout.block_bytes - 1, max_sequence_tokens=128) == 10
    assert layout.blocks_within(8 * layout.block_bytes, max_sequence_tokens=128) == 8
    with pytest.raises(ConfigError, match=r"holds 7 blocks of 16 tokens.*128 needs 8 \(16,384 bytes\)"):
        layout.blocks_within(8 * layout.block_bytes - 1, max_sequence_tokens=128)


def test_a_region_that_has_no_room_is_refused_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_config(tmp_path)
    layout = kv_layout(describe_model(tmp_path).spec, torch.float32)
    monkeypatch.setattr(machine, "free_bytes", lambda: 5 * layout.block_bytes)
    assert KvRegion(layout, blocks=5).blocks == 5
    with pytest.raises(MemoryError, match=r"the KV cache is to have .* are free; lower kv_cache_bytes"):
        KvRegion(layout, blocks=6)


def test_a_native_region_must_find_room_beside_head_and_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are read last, and the region's pages come after them."""
    write_tiny_model("qwen2", tmp_path)
    limits, blocks = StepLimits(max_step_tokens=16, max_sequences=4, max_sequence_tokens=64), 6
    needed = blocks * kv_layout(describe_model(tmp_path).spec, torch.float32).block_bytes
    free = [2 * needed, needed]

    class Builder:
        def __init__(self, *arguments: Any) -> None:
            self._builder = ProgramBuilder(*arguments)

        def block(self, kernels: CpuKernels, **parts: Any) -> None:
            self._builder.block(kernels, **parts)

        def finish(self, *arguments: Any) -> NativeProgram:
            program = self._builder.finish(*arguments)
            free.pop(0)
            return program

    monkeypatch.setattr(native_runner, "ProgramBuilder", Builder)
    monkeypatch.setattr(machine, "free_bytes", lambda: free[0])
    assert NativeExecutor(tmp_path, "float32", limits, blocks).region.blocks == blocks
    free[:] = [2 * needed, needed - 1]
    with pytest.raises(MemoryError, match=f"is to have {needed:,} bytes, and {needed - 1:,} are free"):
        NativeExecutor(tmp_path, "float32", limits, blocks)
