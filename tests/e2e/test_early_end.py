"""Goal: what is told to end before it can serve does so, in good order.

Method: a real node; what its workers are to be copied from is stopped while it imports, so that it would never be done.
A real server, which is ended as soon as it has made its folder.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from llmscale.gateway.local_nodes import STOP_SECONDS
from tests.family import alive_after
from tests.processes import serving, wait_until


def test_sigterm_ends_a_node_whose_first_worker_is_still_importing(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "llmscale.node", "--model", "tiny-chat", "--executor", "torch"]
    command += ["--listen", f"ipc://{tmp_path}/node"]
    with (tmp_path / "log").open("wb") as log, subprocess.Popen(command, stdout=log, stderr=log) as node:
        try:
            children = psutil.Process(node.pid).children
            wait_until(lambda: bool(children()), 60, "it imports")
            children()[0].suspend()
            node.send_signal(signal.SIGTERM)
            assert node.wait(60) == 0, (tmp_path / "log").read_text()
        finally:
            node.kill()
    said = (tmp_path / "log").read_text()
    assert "Traceback" not in said, said
    assert "the node ends" not in said, said


def test_sigterm_to_a_server_that_starts_leaves_neither_its_folder_nor_a_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    command = [sys.executable, "-m", "llmscale.cli", "serve", "tiny-chat", "--port", "0"]
    output = subprocess.DEVNULL
    with subprocess.Popen(command, stdout=output, stderr=output) as server:
        try:
            wait_until(lambda: any(tmp_path.glob("llmscale-serve-*")), 60, "it has made its folder")
            family = psutil.Process(server.pid).children(recursive=True)
            server.send_signal(signal.SIGTERM)
            assert server.wait(60) == 0
        finally:
            server.kill()
    assert not alive_after(family, 60)
    assert not list(tmp_path.glob("llmscale-serve-*"))


def test_more_sigterms_end_a_server_whose_node_does_not_drain() -> None:
    with serving("tiny-chat") as server:
        family = server.family()
        (node,) = psutil.Process(server.process.pid).children()
        node.suspend()

        def has_ended() -> bool:
            server.process.send_signal(signal.SIGTERM)
            return server.process.poll() is not None

        # Less than the time that a node is given.
        wait_until(has_ended, STOP_SECONDS * 0.8, "the server has ended")
        assert not alive_after(family, 60)
