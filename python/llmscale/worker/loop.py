"""The worker's loop: receive, execute, sample, reply.

A step that raises is given up: the engine tells the worker anew what runs, computes the step's sequences one by one,
and ends a request that raised twice. Any other error ends the process with a last word to the engine, and so does a
step that raises on one rank of several, because the others wait for it.
"""

from __future__ import annotations

import time
from pathlib import Path

import structlog
import torch

from llmscale._core import DiskRegion, WorkerOrder, WorkerSession
from llmscale.errors import LlmscaleError, ModelError, OutOfDeviceMemory
from llmscale.parallel.assignment import Assignment
from llmscale.worker.disk_tier import say_trouble
from llmscale.worker.model_runner import ModelRunner
from llmscale.worker.sampling import StepSampling
from llmscale.worker.steps import Steps

_log = structlog.get_logger("llmscale.worker")

WAIT_US = 1_000_000


class WorkerLoop:
    """Runs one session to its end."""

    def __init__(self, session: WorkerSession, assignment: Assignment, threads: int | None) -> None:
        self._session = session
        self._assignment = assignment
        self._threads = threads
        self._runner: ModelRunner | None = None
        self._steps: Steps | None = None
        self._sampling: StepSampling | None = None
        self._disk: DiskRegion | None = None

    def run(self) -> None:
        """Returns when the engine says stop. An error outside a step is told to the engine and raised."""
        try:
            while True:
                order = self._session.receive(WAIT_US, self._disk)
                say_trouble(self._disk)
                if order is None:
                    if self._runner is not None:
                        self._runner.rest()
                    continue
                if order.kind == "stop":
                    return
                if order.kind == "configure":
                    self._configure(order)
                else:
                    self._step(order)
        except BaseException as error:
            self._session.failed(_failure_code(error), f"{self._assignment.who}{type(error).__name__}: {error}")
            raise

    def _configure(self, order: WorkerOrder) -> None:
        started = time.perf_counter_ns()
        runner = ModelRunner(
            Path(self._assignment.model_folder or order.model_folder),
            order.dtype,
            order.limits,
            quantization=self._assignment.quantization,
            threads=self._threads,
            progress=_LoadingProgress(),
            place=self._assignment.place,
            meeting=self._assignment.meeting,
            host_memory=self._assignment.host_memory,
            device=self._assignment.device,
            device_index=self._assignment.device_index,
            disk=self._assignment.disk,
        )
        host_memory, disk_files = (0, 0) if runner.host is None else (runner.host.incarnation, runner.host.disk_files)
        took_ns = time.perf_counter_ns() - started
        blocks = runner.limits.total_blocks
        self._session.ready(runner.layers, runner.numerics, took_ns, blocks, host_memory, disk_files)
        self._disk = None if runner.host is None else runner.host.disk
        self._runner = runner
        self._steps = runner.steps(self._session)
        self._sampling = StepSampling(self._session, runner, self._steps, order.limits.max_sequences)

    def _step(self, order: WorkerOrder) -> None:
        assert self._runner is not None, "a step before the configuration"
        assert self._steps is not None, "a step before the configuration"
        assert self._sampling is not None, "a step before the configuration"
        try:
            if not self._runner.copy(order.counts, self._session):
                _log.warning("blocks of the host tier are bad; their tokens are computed again")
                return
            self._sampling.begin()
            self._steps.compute(order.counts)
            self._sampling.finish(order.counts)
        except OutOfDeviceMemory:
            # Not this step's fault: no step can run any more.
            raise
        except Exception as error:
            if self._assignment.place.ranks > 1:
                raise
            _log.exception("a step raised")
            self._session.step_failed(f"{type(error).__name__}: {error}")


def warm_up() -> None:
    """Makes oneDNN set itself up, which takes 30 ms that need not be part of anybody's pause. Starts no thread."""
    torch.set_num_threads(1)
    for dtype in (torch.float32, torch.bfloat16):
        torch.ones(2, 32, dtype=dtype) @ torch.ones(32, 32, dtype=dtype)


class _LoadingProgress:
    """Logs a large model's loading every few seconds."""

    def __init__(self) -> None:
        self._next = time.monotonic() + 2.0

    def __call__(self, done_bytes: int, total_bytes: int) -> None:
        now = time.monotonic()
        if now >= self._next:
            self._next = now + 2.0
            _log.info("loading weights", done_mb=done_bytes >> 20, total_mb=total_bytes >> 20)


def _failure_code(error: BaseException) -> str:
    if isinstance(error, ModelError):
        return "model"
    if isinstance(error, MemoryError | OutOfDeviceMemory):
        return "memory"
    if isinstance(error, LlmscaleError):
        return "configuration"
    return "step"
