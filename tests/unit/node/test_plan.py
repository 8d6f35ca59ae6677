"""Sizes of a replica that nobody has set."""

from __future__ import annotations

import dataclasses

from llmscale.config import NodeSettings
from llmscale.node.plan import ReplicaPlan, plan_replica


def with_cpus(plan: ReplicaPlan, cpus: int, **changes: int) -> int:
    return dataclasses.replace(plan, **changes).usual_threads(cpus)


def test_threads_are_a_share_of_the_cpus_and_no_more_than_the_weights_are_worth() -> None:
    plan = plan_replica(NodeSettings(model="tiny-chat", listen="tcp://127.0.0.1:0"))
    assert with_cpus(plan, 16) == 1, "nine megabytes are one thread's work"
    assert with_cpus(plan, 16, weight_bytes=270 << 20) == 16
    assert with_cpus(plan, 64, weight_bytes=270 << 20) == 16
    assert with_cpus(plan, 16, weight_bytes=16 << 30) == 16
    assert with_cpus(plan, 16, weight_bytes=16 << 30, tensor_size=4) == 4
    assert with_cpus(plan, 2, weight_bytes=16 << 30, tensor_size=2, stages=2) == 1
