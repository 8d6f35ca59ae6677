"""Goal: an orderly end keeps what was cached above the disk, so that the next start finds what was never evicted.

Method: tiny-chat in float32 with room for every conversation in its pool, offline and served; SIGTERM, start again on
the same folder, ask again. Ids are compared with those of the process before, which nothing disturbed. A node is also
stopped and killed while it saves. A read that takes longer than computing is not waited for, as happens on a busy
machine: half of all must be found, and all must be there.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from pathlib import Path

import psutil
import pytest

from tests.e2e.test_disk_tier import counted, disk_llm, disk_options, first_turns, node_of, places, texts
from tests.e2e.test_host_tier import ask
from tests.processes import Server, serving, wait_until

CONVERSATIONS = 12
POOL_BLOCKS = 128
PROMPT_BLOCKS = 6
"""Full ones of a prompt of 200 tokens; its answer of 24 fills no other, because its last token is never computed."""

pytestmark = pytest.mark.usefixtures("slow_processor")


def asked(server: Server) -> list[tuple[list[str], int]]:
    return [ask(server, number) for number in range(CONVERSATIONS)]


def test_offline_conversations_that_were_never_evicted_are_found_after_close(tmp_path: Path) -> None:
    model = disk_llm(tmp_path, POOL_BLOCKS)
    first = first_turns(model, range(CONVERSATIONS))
    assert model._replica.copied_blocks()[0] == 0, "nothing was evicted"
    assert model._replica.disk_blocks()[0] == 0
    model.close()
    assert model._replica.drained() == (CONVERSATIONS * PROMPT_BLOCKS, 0)
    assert len(places(tmp_path)) == CONVERSATIONS * PROMPT_BLOCKS
    again = disk_llm(tmp_path, POOL_BLOCKS)
    assert first_turns(again, range(CONVERSATIONS)) == first
    assert again._replica.load()[5] >= CONVERSATIONS * PROMPT_BLOCKS * 32 / 2
    _, read, bad, _, waits = again._replica.disk_blocks()
    assert read >= CONVERSATIONS * PROMPT_BLOCKS / 2
    assert (bad, waits) == (0, 0)
    again.close()


def test_close_saves_nothing_when_it_has_no_time_and_says_so(tmp_path: Path) -> None:
    model = disk_llm(tmp_path, POOL_BLOCKS)
    first_turns(model, range(2))
    model.close(max_saving_seconds=0)
    assert model._replica.drained() == (0, 2 * PROMPT_BLOCKS)
    assert places(tmp_path) == []


def test_a_served_conversation_that_was_never_evicted_is_found_after_sigterm_and_a_start(tmp_path: Path) -> None:
    with serving("tiny-chat", *disk_options(tmp_path, pool_blocks=POOL_BLOCKS)) as server:
        first = asked(server)
        assert counted(server, "written_blocks") == 0
        assert all(cached == 0 for _, cached in first)
    assert "saved_blocks" in server.log()
    with serving("tiny-chat", *disk_options(tmp_path, pool_blocks=POOL_BLOCKS)) as server:
        again = asked(server)
        assert texts(again) == texts(first)
        assert {cached for _, cached in again} <= {blocks * 32 for blocks in range(PROMPT_BLOCKS + 1)}
        found = sum(cached for _, cached in again) / 32
        assert found >= CONVERSATIONS * PROMPT_BLOCKS / 2, again
        wait_until(lambda: counted(server, "read_blocks") >= found, 120, "the node told of it")
        assert (counted(server, "bad_blocks"), counted(server, "lost_records")) == (0, 0)


def stop_when_it_writes(folder: Path, worker: psutil.Process) -> None:
    """Has the worker stand still as soon as one place holds something: most of what is to be saved is not there yet."""
    deadline = time.monotonic() + 60
    while not places(folder):
        assert time.monotonic() < deadline, "the node saves nothing"
    # On a busy machine it may have saved everything by now, and be gone: then nothing of it may be bad either.
    with contextlib.suppress(psutil.NoSuchProcess):
        worker.suspend()


def test_a_node_that_is_killed_while_it_saves_leaves_nothing_that_is_half_there(tmp_path: Path) -> None:
    with serving("tiny-chat", *disk_options(tmp_path, pool_blocks=POOL_BLOCKS)) as server:
        first = asked(server)
        (folder,) = tmp_path.iterdir()
        node, worker = node_of(server), psutil.Process(server.worker_pid())
        stopping = threading.Thread(target=stop_when_it_writes, args=(folder, worker))
        stopping.start()
        os.kill(node.pid, signal.SIGTERM)
        stopping.join()
        with contextlib.suppress(psutil.NoSuchProcess):
            node.kill()
        wait_until(lambda: not node.is_running() and server.is_ready(), 120, "another node is ready")
        again = asked(server)
        assert texts(again) == texts(first)
        assert counted(server, "bad_blocks") == 0
