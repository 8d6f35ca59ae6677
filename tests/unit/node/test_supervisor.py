"""When a node's supervisor ends worker processes, with an engine and processes that only say what they were told."""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from llmscale._core import Engine, EngineLimits
from llmscale.node.plan import ReplicaPlan
from llmscale.node.supervisor import WorkerSupervisor
from llmscale.node.worker_process import WorkerProcesses
from llmscale.parallel.assignment import Assignment
from llmscale.parallel.layout import HostLayout

PLAN = ReplicaPlan(
    folder=Path("/"),
    name="model",
    dtype="float32",
    quantization=None,
    kv_dtype="auto",
    limits=cast("EngineLimits", None),
    sequence_reason="",
    weights_digest=b"",
    tokenizer_digest=b"",
    revision="1",
    block_bytes=1,
    weight_bytes=1,
    configuration_digest=b"",
    layout=HostLayout(),
    max_step_seconds=120.0,
    device="cpu",
    first_device=0,
    executor="torch",
    executor_reason="",
    quantization_label="none",
)


@dataclass
class Event:
    kind: str
    epoch: int
    message: str


@dataclass
class Report:
    steps: int = 0


@dataclass
class FakeEngine:
    """Hands out epochs, says what it is told to, and notes which workers were buried."""

    wake: int
    epoch: int = 0
    said: list[Event] = field(default_factory=list)
    buried: list[int] = field(default_factory=list)
    heard: asyncio.Event = field(default_factory=asyncio.Event)
    second: asyncio.Event = field(default_factory=asyncio.Event)

    def fileno(self) -> int:
        return self.wake

    def report(self) -> Report:
        return Report()

    def prepare_worker(self, *_: object, **__: object) -> tuple[int, list[str]]:
        self.epoch += 1
        return self.epoch, [f"link-{self.epoch}"]

    def worker_died(self, epoch: int) -> None:
        self.buried.append(epoch)

    def say(self, event: Event) -> None:
        self.said.append(event)
        os.eventfd_write(self.wake, 1)

    def take_events(self) -> list[Event]:
        os.eventfd_read(self.wake)
        said, self.said = self.said, []
        self.heard.set()
        return said


@dataclass
class FakeProcess:
    """Lives until it is told to end."""

    pid: int
    over: asyncio.Event = field(default_factory=asyncio.Event)

    async def wait(self) -> int:
        await self.over.wait()
        return -9

    def send_signal(self, _: int) -> None:
        self.over.set()

    async def stop(self) -> None:
        self.over.set()


@dataclass
class FakeProcesses:
    """The engine gives the first worker up while its process is still being started."""

    engine: FakeEngine

    async def start(self, assignment: Assignment) -> FakeProcess:
        if assignment.epoch == 1:
            self.engine.say(Event("worker_failed", 1, "rank 0 did not connect"))
            await self.engine.heard.wait()
        else:
            self.engine.second.set()
        return FakeProcess(assignment.epoch)

    async def close(self) -> None:
        pass


async def test_a_worker_that_the_engine_gives_up_before_it_has_started_is_ended_when_it_has() -> None:
    wake = os.eventfd(0)
    try:
        engine = FakeEngine(wake)
        processes = cast("WorkerProcesses", FakeProcesses(engine))
        supervisor = WorkerSupervisor(cast("Engine", engine), PLAN, processes)
        running = asyncio.create_task(supervisor.run())
        async with asyncio.timeout(30):
            await engine.second.wait()
            assert engine.buried == [1]
            await supervisor.stop()
            await running
    finally:
        os.close(wake)
