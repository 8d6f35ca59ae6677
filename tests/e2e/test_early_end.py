"""Goal: a node that is told to end before it can serve does so, in good order.

Method: a real node; what its workers are to be copied from is stopped while it imports, so that it would never be done.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import psutil

from tests.processes import wait_until


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
