"""Goal: a node ends in good order when it is asked, and at once when somebody insists, and can tell the two apart."""

from __future__ import annotations

import asyncio
import signal
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import cast

import pytest

from llmscale._core import Engine
from llmscale.gateway.local_nodes import ASKING
from llmscale.node.__main__ import _drain
from llmscale.node.stop_signal import StopSignal
from llmscale.node.supervisor import WorkerSupervisor


def test_the_first_signal_asks_and_a_later_one_of_its_kind_insists() -> None:
    stop = StopSignal()
    stop.hear(signal.SIGTERM, 100.0)
    assert stop.asked.is_set()
    assert not stop.insisted.is_set()
    stop.hear(signal.SIGTERM, 103.0)
    assert stop.insisted.is_set()


def test_signals_that_come_together_and_those_of_another_kind_are_one_wish() -> None:
    stop = StopSignal()
    for number, now in ((signal.SIGINT, 100.0), (signal.SIGINT, 100.1), (signal.SIGTERM, 104.0), (ASKING, 106.0)):
        stop.hear(number, now)
    assert not stop.insisted.is_set()


@dataclass(slots=True)
class _Engine:
    asked: list[tuple[int, int]] = field(default_factory=list)

    def drain(self, *, max_drain_us: int, max_saving_us: int) -> None:
        self.asked.append((max_drain_us, max_saving_us))


@pytest.mark.parametrize("which", ["drained", "insisted", "given up"])
async def test_a_drain_ends_with_what_it_waits_for_or_when_somebody_insists_or_no_worker_is_started_any_more(
    which: str,
) -> None:
    engine, given_up = _Engine(), asyncio.Event()

    async def supervise() -> None:
        await given_up.wait()

    stop, supervisor = StopSignal(), SimpleNamespace(drained=asyncio.Event())
    supervising = asyncio.create_task(supervise())
    ends = _drain(cast(Engine, engine), cast(WorkerSupervisor, supervisor), supervising, stop, 2.5)
    draining = asyncio.create_task(ends)
    await asyncio.sleep(0)
    assert not draining.done()
    {"drained": supervisor.drained, "insisted": stop.insisted, "given up": given_up}[which].set()
    await asyncio.wait_for(draining, 10)
    assert engine.asked == [(30_000_000, 2_500_000)]
    supervising.cancel()
