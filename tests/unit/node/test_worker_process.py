"""The node's worker processes, with a small program in the place of a worker."""

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
from llmscale.node.worker_process import WorkerProcesses
from llmscale.parallel.assignment import Assignment, Meeting, read_assignment, write_assignment

# Writes what it was told to serve to the file that it was told to serve, then waits to be ended.
PROGRAM = """
import json, signal, sys
line = sys.stdin.readline()
if line:
    told = json.loads(line)
    open(told["link"], "w").write(str(told["epoch"]))
    signal.pause()
"""


@pytest.fixture
async def processes() -> AsyncIterator[WorkerProcesses]:
    started = WorkerProcesses(None, keep_spares=1, command=(sys.executable, "-c", PROGRAM))
    yield started
    await started.close()


async def test_the_spare_takes_over_and_is_replaced(processes: WorkerProcesses, tmp_path: Path) -> None:
    first = await processes.start(Assignment(str(tmp_path / "first"), 1))
    await processes.prepare()
    await processes.prepare()
    first.send_signal(signal.SIGKILL)
    assert await first.wait() == -signal.SIGKILL
    (spare,) = processes.spares
    second = await processes.start(Assignment(str(tmp_path / "second"), 2))
    assert second is spare
    assert not processes.spares
    await processes.prepare()
    assert [spare.pid for spare in processes.spares] != [second.pid]
    await second.stop()


async def test_a_spare_that_died_is_not_used(processes: WorkerProcesses, tmp_path: Path) -> None:
    await processes.prepare()
    (spare,) = processes.spares
    spare.send_signal(signal.SIGKILL)
    await spare.wait()
    worker = await processes.start(Assignment(str(tmp_path / "link"), 1))
    assert worker.pid != spare.pid
    assert worker.is_alive
    await worker.stop()
    assert not worker.is_alive


async def test_no_spare_is_kept_against_the_settings() -> None:
    processes = WorkerProcesses(None, keep_spares=0, command=(sys.executable, "-c", PROGRAM))
    await processes.prepare()
    assert not processes.spares


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


async def test_what_a_process_serves_reaches_it(processes: WorkerProcesses, tmp_path: Path) -> None:
    said = tmp_path / "said"
    os.mkfifo(said)
    worker = await processes.start(Assignment(str(said), 7))
    # Opening a fifo waits for its writer.
    assert await asyncio.to_thread(said.read_text) == "7"
    await worker.stop()


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
    command = [sys.executable, "-X", "importtime", "-m", "llmscale.worker", "--parent", "1"]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode != 0
    assert "the parent process 1 is gone" in done.stderr
    assert " torch" not in done.stderr
