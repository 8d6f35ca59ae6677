"""Sizes of a replica that nobody has set."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from llmscale import machine
from llmscale._core import EngineLimits
from llmscale.config import MAX_SEQUENCES, NodeSettings
from llmscale.errors import ConfigError, InvalidField
from llmscale.node.plan import MAX_POOL_BLOCKS, ReplicaPlan, check_kv_dtype, choose_executor, plan_replica
from llmscale.parallel.layout import HostLayout
from tests.models_support import write_random_checkpoint


def with_cpus(plan: ReplicaPlan, cpus: int, weight_bytes: int = 9 << 20, layout: HostLayout | None = None) -> int:
    changed = dataclasses.replace(plan, weight_bytes=weight_bytes, layout=layout or plan.layout)
    return changed.threads_of_worker(NodeSettings(model="tiny-chat", listen="", cpus=cpus))


def test_threads_are_a_share_of_the_cpus_and_no_more_than_the_weights_are_worth() -> None:
    plan = plan_replica(NodeSettings(model="tiny-chat", listen="tcp://127.0.0.1:0"))
    assert with_cpus(plan, 16) == 1, "nine megabytes are one thread's work"
    assert with_cpus(plan, 16, weight_bytes=270 << 20) == 16
    assert with_cpus(plan, 64, weight_bytes=270 << 20) == 16
    assert with_cpus(plan, 16, weight_bytes=16 << 30) == 16
    assert with_cpus(plan, 16, weight_bytes=16 << 30, layout=HostLayout(4)) == 4
    assert with_cpus(plan, 2, weight_bytes=16 << 30, layout=HostLayout(2, 2)) == 1
    assert with_cpus(plan, 16, weight_bytes=16 << 30, layout=HostLayout(2, 2, 2)) == 8, "two ranks on this host"
    asked = NodeSettings(model="tiny-chat", listen="", cpus=16, threads=3)
    assert plan.threads_of_worker(asked) == 3, "whoever asks decides"
    with pytest.raises(ConfigError, match="cpus is 0, it must be 1 or more"):
        replace(asked, cpus=0)


@pytest.mark.parametrize("milliseconds", [-0.1, 60_001.0, float("nan")])
def test_a_target_that_no_step_can_have_is_refused_with_its_limit(milliseconds: float) -> None:
    with pytest.raises(ConfigError, match=r"step_target_milliseconds is .*, it must be 0, for no bound, to 60000"):
        NodeSettings(model="tiny-chat", listen="tcp://127.0.0.1:0", step_target_milliseconds=milliseconds)


def test_replicas_of_one_host_share_what_is_taken_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = NodeSettings(model="tiny-chat", listen="tcp://127.0.0.1:0")
    monkeypatch.setattr(machine, "memory_bytes", lambda: 64 << 30)
    roomy = plan_replica(settings).limits
    assert roomy.total_blocks == 65_536 // 32, "64k tokens, however large the machine is"
    block_bytes = plan_replica(settings).block_bytes
    monkeypatch.setattr(machine, "memory_bytes", lambda: 4 * 900 * block_bytes)
    alone, four = plan_replica(settings).limits, plan_replica(replace(settings, replicas_here=4)).limits
    assert (alone.total_blocks, four.total_blocks) == (900, 225)
    assert (alone.host_blocks, four.host_blocks) == (450, 112)


def test_a_plan_for_a_gpu_has_the_number_format_that_its_workers_load_float16_in(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    write_random_checkpoint(tmp_path, dtype=torch.float16)
    (tmp_path / "tokenizer.json").write_text("{}")
    settings = NodeSettings(model=str(tmp_path), listen="tcp://127.0.0.1:0", device="cpu")
    assert plan_replica(settings).dtype == "float32"
    monkeypatch.setattr("llmscale.node.plan.choose", lambda asked, workers: "cuda")
    monkeypatch.setattr("llmscale.node.plan._device_bytes", lambda *_: 1 << 30)
    assert plan_replica(settings).dtype == "bfloat16"


def test_sequences_are_as_long_as_the_share_of_the_memory_holds_unless_somebody_says_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("llmscale.node.plan.LEAST_SEQUENCE_TOKENS", 64)
    settings = NodeSettings(model="tiny-chat", listen="tcp://127.0.0.1:0")
    block_bytes = plan_replica(settings).block_bytes
    for blocks, expected in [(64, 2_048), (50, 1_600), (1, 64)]:
        monkeypatch.setattr(machine, "memory_bytes", lambda blocks=blocks: 4 * blocks * block_bytes)
        plan = plan_replica(settings)
        assert plan.limits.max_sequence_tokens == expected
        assert plan.limits.total_blocks >= expected // 32
        assert ("raise --kv-cache-bytes" in plan.sequence_reason) == (expected < 2_048)
        asked = plan_replica(replace(settings, max_sequence_tokens=2_000))
        assert asked.limits.max_sequence_tokens == 2_000
        given = plan_replica(replace(settings, kv_cache_bytes=64 * block_bytes))
        assert given.limits.max_sequence_tokens == 2_048


def test_the_configuration_has_one_digest_in_every_process() -> None:
    settings = NodeSettings(model="tiny-chat-mini", listen="tcp://127.0.0.1:0")
    words = [sys.executable, "-c", PRINTS_DIGEST]
    printed = {
        subprocess.run(words, env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, check=True).stdout
        for seed in ("1", "2")
    }
    assert printed == {plan_replica(settings).configuration_digest.hex().encode()}
    other = plan_replica(NodeSettings(model="tiny-chat", listen="tcp://127.0.0.1:0"))
    assert other.configuration_digest.hex().encode() not in printed


@pytest.mark.parametrize(
    ("wanted", "device", "ranks", "refusal", "chosen"),
    [
        ("auto", "cpu", 1, None, ("native", "auto is native for one rank on the CPU")),
        ("native", "cpu", 1, None, ("native", "as executor (--executor) says")),
        ("torch", "cpu", 1, None, ("torch", "as executor (--executor) says")),
        ("torch", "cpu", 1, "it cannot", ("torch", "as executor (--executor) says")),
        ("auto", "cpu", 1, "it cannot read these scales", ("torch", "it cannot read these scales")),
        ("auto", "cpu", 2, None, ("torch", "the native executor runs one rank, not 2")),
        ("auto", "cuda", 1, None, ("torch", "the native executor computes on the CPU, not on cuda")),
    ],
)
def test_an_executor_is_chosen_with_a_reason(
    wanted: str, device: str, ranks: int, refusal: str | None, chosen: tuple[str, str]
) -> None:
    assert choose_executor(wanted, device, ranks, refusal) == chosen


def test_stages_lower_the_most_sequences_by_the_name_that_the_option_has() -> None:
    settings = NodeSettings(model="tiny-chat", listen="", pipeline_parallel_size=3, max_sequences=32_768 // 3)
    plan_replica(settings)
    with pytest.raises(ConfigError, match=r"--max-num-seqs\) is 10,923, it must be at most 10,922 where 3 stages"):
        plan_replica(replace(settings, max_sequences=10_923))


def test_a_plan_says_how_weights_are_held_once_they_are_loaded() -> None:
    settings = NodeSettings(model="tiny-chat", listen="")
    assert plan_replica(settings).quantization_label == "none"
    assert plan_replica(replace(settings, quantization="int4-64")).quantization_label == "int4-g64"


def test_keys_and_values_are_bytes_only_where_something_reads_them_so() -> None:
    check_kv_dtype("int8", "native", "cpu")
    check_kv_dtype("auto", "torch", "cuda")
    with pytest.raises(ConfigError, match=r"kv_dtype is 'int8', and the torch executor keeps .*; leave it at auto"):
        check_kv_dtype("int8", "torch", "cpu")
    with pytest.raises(ConfigError, match=r"kv_dtype is 'int8', and workers on cuda keep .*; leave it at auto"):
        check_kv_dtype("int8", "torch", "cuda")
    with pytest.raises(ConfigError, match="kv_dtype is 'int4', it must be one of auto, int8"):
        NodeSettings(model="tiny-chat", listen="", kv_dtype="int4")


def test_the_same_memory_has_more_blocks_of_bytes() -> None:
    budget = 1 << 26

    def plan(kv_dtype: str, dtype: str) -> ReplicaPlan:
        settings = NodeSettings(model="tiny-chat", listen="", dtype=dtype, kv_dtype=kv_dtype, kv_cache_bytes=budget)
        return plan_replica(settings)

    plans = [plan("auto", "float32"), plan("auto", "bfloat16"), plan("int8", "float32"), plan("int8", "bfloat16")]
    # Of a row of a head of 32, in bytes with its scale.
    rows = [128, 64, 36, 36]
    assert [each.block_bytes * 128 for each in plans] == [plans[0].block_bytes * row for row in rows]
    assert [each.limits.total_blocks for each in plans] == [budget // each.block_bytes for each in plans]


PRINTS_DIGEST = """
from llmscale.config import NodeSettings
from llmscale.node.plan import plan_replica
plan = plan_replica(NodeSettings(model="tiny-chat-mini", listen="tcp://127.0.0.1:0"))
print(plan.configuration_digest.hex(), end="")
"""


def test_the_most_sequences_are_those_that_the_core_takes() -> None:
    def with_sequences(most: int) -> EngineLimits:
        return EngineLimits(
            vocabulary=9, total_blocks=9, max_sequence_tokens=9, eos_tokens=(), max_sequences=most, max_step_tokens=most
        )

    assert with_sequences(MAX_SEQUENCES).max_sequences == MAX_SEQUENCES
    with pytest.raises(InvalidField, match="max_sequences times max_steps_in_flight is"):
        with_sequences(MAX_SEQUENCES + 1)


def test_the_largest_pool_is_what_the_core_takes() -> None:
    def with_blocks(most: int) -> EngineLimits:
        return EngineLimits(vocabulary=9, total_blocks=most, max_sequence_tokens=9, eos_tokens=())

    assert with_blocks(MAX_POOL_BLOCKS).total_blocks == MAX_POOL_BLOCKS
    with pytest.raises(InvalidField, match="total_blocks is"):
        with_blocks(MAX_POOL_BLOCKS + 1)
