"""Sizes of a replica that nobody has set."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from dataclasses import replace

import pytest

from llmscale import machine
from llmscale.config import NodeSettings
from llmscale.errors import ConfigError
from llmscale.node.plan import ReplicaPlan, plan_replica
from llmscale.parallel.layout import HostLayout


def with_cpus(plan: ReplicaPlan, cpus: int, weight_bytes: int = 9 << 20, layout: HostLayout | None = None) -> int:
    changed = dataclasses.replace(plan, weight_bytes=weight_bytes, layout=layout or plan.layout)
    return changed.usual_threads(cpus)


def test_threads_are_a_share_of_the_cpus_and_no_more_than_the_weights_are_worth() -> None:
    plan = plan_replica(NodeSettings(model="tiny-chat", listen="tcp://127.0.0.1:0"))
    assert with_cpus(plan, 16) == 1, "nine megabytes are one thread's work"
    assert with_cpus(plan, 16, weight_bytes=270 << 20) == 16
    assert with_cpus(plan, 64, weight_bytes=270 << 20) == 16
    assert with_cpus(plan, 16, weight_bytes=16 << 30) == 16
    assert with_cpus(plan, 16, weight_bytes=16 << 30, layout=HostLayout(4)) == 4
    assert with_cpus(plan, 2, weight_bytes=16 << 30, layout=HostLayout(2, 2)) == 1
    assert with_cpus(plan, 16, weight_bytes=16 << 30, layout=HostLayout(2, 2, 2)) == 8, "two ranks on this host"


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


PRINTS_DIGEST = """
from llmscale.config import NodeSettings
from llmscale.node.plan import plan_replica
plan = plan_replica(NodeSettings(model="tiny-chat-mini", listen="tcp://127.0.0.1:0"))
print(plan.configuration_digest.hex(), end="")
"""
