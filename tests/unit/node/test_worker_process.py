"""The node's worker processes, with a small program in the place of the one that imports torch."""

from __future__ import annotations

import asyncio
import io
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from llmscale.errors import ConfigError, WorkerError
from llmscale.models.shard import RankPlace
from llmscale.node.worker_process import WorkerProcess, WorkerProcesses
from llmscale.parallel.assignment import Assignment, Meeting, read_assignment, write_assignment

# Copies write what they were told to serve to the file that they were told to serve, then wait to be ended.
PROGRAM = """
import json, os, signal, socket, sys
from llmscale.worker.template import wait_to_be_born
pipe = wait_to_be_born(socket.socket(fileno=int(sys.argv[-1])), int(sys.argv[-3]))
line = pipe and pipe.readline()
if line:
    told = json.loads(line)
    open(told["link"], "w").write(f"{told['epoch']} {os.getppid()}")
    signal.pause()
"""
BROKEN = "raise SystemExit(3)"


def of_program(program: str, *, keep_spare: bool = True) -> WorkerProcesses:
    return WorkerProcesses(None, keep_spare=keep_spare, command=(sys.executable, "-c", program, str(os.getpid())))


@pytest.fixture
async def processes() -> AsyncIterator[WorkerProcesses]:
    started = of_program(PROGRAM)
    yield started
    await started.close()


async def told(processes: WorkerProcesses, folder: Path, epoch: int) -> tuple[WorkerProcess, str]:
    """A process that has been started, and what it says about itself."""
    said = folder / f"said-{epoch}"
    os.mkfifo(said)
    process = await processes.start(Assignment(str(said), epoch))
    # Opening a fifo waits for its writer.
    return process, await asyncio.to_thread(said.read_text)


async def test_workers_are_copies_of_one_process_and_children_of_the_node(
    processes: WorkerProcesses, tmp_path: Path
) -> None:
    workers = []
    for epoch in (1, 2, 3):
        worker, said = await told(processes, tmp_path, epoch)
        assert said == f"{epoch} {os.getpid()}"
        workers.append(worker)
    assert len({processes.spare, *(worker.pid for worker in workers)}) == 4
    for worker in workers:
        worker.send_signal(signal.SIGKILL)
        assert await worker.wait() == -signal.SIGKILL


async def test_workers_live_on_when_the_process_that_they_were_copied_from_dies_and_it_is_replaced(
    processes: WorkerProcesses, tmp_path: Path
) -> None:
    first, _ = await told(processes, tmp_path, 1)
    spare = processes.spare
    assert spare is not None
    os.kill(spare, signal.SIGKILL)
    second, said = await told(processes, tmp_path, 2)
    assert said == f"2 {os.getpid()}"
    assert processes.spare not in (None, spare)
    assert first.is_alive
    await asyncio.gather(first.stop(), second.stop())
    assert not first.is_alive


async def test_a_spare_that_died_is_replaced_before_it_is_needed(processes: WorkerProcesses, tmp_path: Path) -> None:
    worker, _ = await told(processes, tmp_path, 1)
    spare = processes.spare
    await processes.prepare()
    assert processes.spare == spare
    assert spare is not None
    os.kill(spare, signal.SIGKILL)
    # Its end is noticed by the event loop, some time.
    async with asyncio.timeout(20):
        while processes.spare == spare:
            await asyncio.to_thread(os.sched_yield)
            await processes.prepare()
    await worker.stop()


async def test_no_spare_is_kept_against_the_settings(tmp_path: Path) -> None:
    processes = of_program(PROGRAM, keep_spare=False)
    worker, _ = await told(processes, tmp_path, 1)
    await processes.prepare()
    assert processes.spare is None
    assert worker.is_alive
    await worker.stop()
    another, _ = await told(processes, tmp_path, 2)
    await another.stop()
    await processes.close()


async def test_a_spare_that_the_system_refuses_costs_the_node_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refuse(*_words: object, **_options: object) -> None:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    processes = of_program(PROGRAM)
    with monkeypatch.context() as patch:
        patch.setattr(asyncio, "create_subprocess_exec", refuse)
        await processes.prepare()
        assert processes.spare is None
    worker, _ = await told(processes, tmp_path, 1)
    await worker.stop()
    await processes.close()


async def test_a_template_that_cannot_start_is_an_error_with_its_exit_code(tmp_path: Path) -> None:
    processes = of_program(BROKEN)
    with pytest.raises(WorkerError, match="ended with code 3"):
        await processes.start(Assignment(str(tmp_path / "link"), 1))
    await processes.close()


async def test_the_end_of_a_node_does_not_wait_for_imports(tmp_path: Path) -> None:
    processes = of_program("import signal; signal.pause()")
    starting = asyncio.create_task(processes.start(Assignment(str(tmp_path / "link"), 1)))
    async with asyncio.timeout(60):
        while processes.spare is None:
            await asyncio.to_thread(os.sched_yield)
        await processes.close()
        with pytest.raises(WorkerError, match="ended with code -9"):
            await starting
        assert processes.spare is None
        await processes.prepare()
        assert processes.spare is None


async def test_a_process_with_threads_is_not_copied(tmp_path: Path) -> None:
    threaded = "import threading; threading.Thread(target=lambda: signal.pause(), daemon=True).start()"
    program = PROGRAM.replace("from llmscale", f"{threaded}\nfrom llmscale")
    processes = of_program(program)
    with pytest.raises(WorkerError, match="ended with code 1"):
        await processes.start(Assignment(str(tmp_path / "link"), 1))
    await processes.close()


async def test_a_copy_that_the_system_refuses_is_an_error_and_no_wait_for_ever(tmp_path: Path) -> None:
    # The first fork is that of the process between, which cannot make the second.
    refusing = """
import errno, os
fork, forks = os.fork, []
def refuse_the_second():
    forks.append(1)
    if len(forks) == 2:
        raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))
    return fork()
os.fork = refuse_the_second
"""
    processes = of_program(refusing + PROGRAM)
    async with asyncio.timeout(60):
        with pytest.raises(WorkerError, match="ended with code 1"):
            await processes.start(Assignment(str(tmp_path / "link"), 1))
    await processes.close()


async def test_a_worker_with_torch_is_copied_whatever_the_environment_says_of_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "2")
    processes = WorkerProcesses(1, keep_spare=True)
    worker = await processes.start(Assignment(str(tmp_path / "link"), 1))
    assert worker.pid != processes.spare
    await worker.stop()
    await processes.close()


async def test_signals_to_a_process_that_has_ended_reach_nobody(processes: WorkerProcesses, tmp_path: Path) -> None:
    worker = await processes.start(Assignment(str(tmp_path / "link"), 1))
    worker.send_signal(signal.SIGKILL)
    await worker.wait()
    worker.send_signal(signal.SIGKILL)
    await worker.stop()


async def test_a_process_that_is_asked_to_end_before_its_end_is_noticed_keeps_its_exit_code(
    processes: WorkerProcesses, tmp_path: Path
) -> None:
    worker = await processes.start(Assignment(str(tmp_path / "link"), 1))
    worker.send_signal(signal.SIGKILL)
    worker.send_signal(signal.SIGTERM)
    assert await worker.wait() == -signal.SIGKILL


@pytest.mark.parametrize(
    "line", [b"\n", b"{}\n", b'{"link": 1, "epoch": 1}\n', b'{"link": "x", "epoch": 1, "more": 1}\n', b"x" * 9_000]
)
def test_a_worker_that_is_started_by_hand_says_who_starts_it(line: bytes) -> None:
    with pytest.raises(WorkerError, match="started by a node"):
        read_assignment(io.BytesIO(line))


def test_a_rank_that_does_not_exist_is_no_assignment() -> None:
    line = b'{"link": "x", "epoch": 1, "place": {"tensor_rank": 2, "tensor_size": 2}}\n'
    with pytest.raises(ConfigError, match="rank 2 of 2"):
        read_assignment(io.BytesIO(line))


def test_an_assignment_is_one_line_and_its_absence_means_not_needed() -> None:
    place, meeting = RankPlace(1, 2, 0, 2), Meeting("/proc/1/fd/9", rendezvous="/somewhere/ranks", max_wait_seconds=5.0)
    assignment = Assignment("ipc://x", 3, place, meeting)
    source = io.BytesIO(write_assignment(assignment) + write_assignment(Assignment("ipc://y", 4)))
    assert read_assignment(source) == assignment
    assert read_assignment(source) == Assignment("ipc://y", 4)
    assert read_assignment(source) is None
    assert (assignment.who, Assignment("ipc://y", 4).who) == ("rank 1: ", "")


def test_a_worker_whose_node_is_gone_ends_before_it_imports_anything_large() -> None:
    """A node that dies while its spare starts leaves it with a foster parent; the pipe alone would be looked at only
    after the import of torch."""
    command = [sys.executable, "-X", "importtime", "-m", "llmscale.worker", "--parent", "1", "--orders", "9"]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode != 0
    assert "the parent process 1 is gone" in done.stderr
    assert " torch" not in done.stderr
