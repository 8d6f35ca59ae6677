"""The worker's loop: receive, execute, sample, reply. On a device the last two are one step behind the first.

A step that raises is given up: the engine tells the worker anew what runs, computes the step's sequences one by one,
and ends a request that raised twice. Any other error ends the process with a last word to the engine, and so does a
step that raises on one rank of several, because the others wait for it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llmscale._core import DiskRegion, WorkerOrder, WorkerSession
from llmscale.errors import LlmscaleError, ModelError, OutOfDeviceMemory
from llmscale.logs import get_logger
from llmscale.parallel.assignment import Assignment
from llmscale.worker.disk_tier import say_trouble
from llmscale.worker.runner import Runner, RunnerOptions, make_runner
from llmscale.worker.sampling import StepSampling
from llmscale.worker.step_queue import StepQueue

_log = get_logger("llmscale.worker")

WAIT_US = 1_000_000
OPEN_WAIT_US = 100
"""How often the loop looks whether the device is done, while no other step comes: a step takes 50 times as long."""


class WorkerLoop:
    """Runs one session to its end."""

    def __init__(self, session: WorkerSession, assignment: Assignment, threads: int | None) -> None:
        self._session = session
        self._assignment = assignment
        self._threads = threads
        self._runner: Runner | None = None
        self._queue: StepQueue | None = None
        self._sampling: StepSampling | None = None
        self._disk: DiskRegion | None = None

    def run(self) -> None:
        """Returns when the engine says stop. An error outside a step is told to the engine and raised."""
        try:
            while True:
                is_open = self._queue is not None and not self._queue.is_empty
                order = self._session.receive(OPEN_WAIT_US if is_open else WAIT_US, self._disk)
                say_trouble(self._disk)
                if order is None:
                    self._rest()
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
        assignment = self._assignment
        options = RunnerOptions(
            dtype=order.dtype,
            quantization=assignment.quantization,
            kv_dtype=assignment.kv_dtype,
            threads=self._threads,
            place=assignment.place,
            meeting=assignment.meeting,
            host_memory=assignment.host_memory,
            disk=assignment.disk,
            device=assignment.device,
            device_index=assignment.device_index,
        )
        folder = Path(assignment.model_folder or order.model_folder)
        runner = make_runner(assignment.executor, folder, order.limits, options, _LoadingProgress())
        host_memory, disk_files = (0, 0) if runner.host is None else (runner.host.incarnation, runner.host.disk_files)
        took_ns = time.perf_counter_ns() - started
        blocks = runner.limits.total_blocks
        self._session.ready(runner.layers, runner.numerics, took_ns, blocks, host_memory, disk_files)
        self._disk = None if runner.host is None else runner.host.disk
        self._runner = runner
        steps = runner.steps(self._session)
        self._sampling = StepSampling(self._session, runner, steps, order.limits.max_sequences)
        self._queue = StepQueue(runner, steps, self._session, self._sampling.finish)

    def _step(self, order: WorkerOrder) -> None:
        assert self._queue is not None, "a step before the configuration"
        assert self._sampling is not None, "a step before the configuration"
        with self._giving_up():
            if not self._queue.take(order.counts, self._sampling.begin):
                _log.warning("blocks of the host tier are bad; their tokens are computed again")

    def _rest(self) -> None:
        """No step came: answers the one that is open once it is done, or uses the time."""
        if self._runner is None or self._queue is None:
            return
        if self._queue.is_empty:
            self._runner.rest()
            return
        with self._giving_up():
            if self._queue.is_done:
                self._queue.answer()

    @contextmanager
    def _giving_up(self) -> Iterator[None]:
        """A step that raises within is given up."""
        assert self._queue is not None, "a step before the configuration"
        try:
            yield
        except OutOfDeviceMemory:
            # Not this step's fault: no step can run any more.
            raise
        except Exception as error:
            if self._assignment.place.ranks > 1:
                raise
            _log.exception("a step raised")
            self._queue.forget()
            self._session.step_failed(f"{type(error).__name__}: {error}")


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
