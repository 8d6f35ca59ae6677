"""Goal: what a terminal or a service manager sends to every process of a server ends it in good order.

Method: a real server with a disk tier is the only one of its process group with all that it has started; the group gets
the signal while a stream runs. The stream must be whole, by the workers that it had, and its cache on the disk.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.e2e.test_disk_tier import disk_options
from tests.family import alive_after
from tests.processes import free_port, serving, stopped, token_ids, wait_until

TOKENS = 300


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_a_running_stream_is_finished_and_saved_after_a_signal_to_all_processes(
    number: signal.Signals, tmp_path: Path
) -> None:
    with serving("tiny-chat", *disk_options(tmp_path, pool_blocks=128)) as server:
        family = server.family()
        body = {"model": "tiny-chat", "prompt": "Once upon a time", "max_tokens": TOKENS, "ignore_eos": True}
        with ThreadPoolExecutor(1) as pool:
            # The stream is in the middle for as long as its worker stands still, however late this process is.
            with stopped(server.worker_pid()):
                stream = pool.submit(token_ids, server, {**body, "seed": 3, "temperature": 1})
                wait_until(lambda: server.held() == 1, 120, "the replica has the stream", server.replicas)
                os.killpg(server.process.pid, number)
            assert len(stream.result()) == TOKENS
        assert server.process.wait(60) == 0
        assert not alive_after(family, 60)
    log = server.log()
    assert "worker died" not in log, log
    assert "Traceback" not in log, log
    saved = re.search(r"\bsaved_blocks\W+(\d+)", log)
    assert saved, log
    assert int(saved[1]) > 0, log


# A node that gets the signal before it has made anything: when it reads the model's files.
SIGNALLED = """
import os, signal
# A script's background jobs ignore it, and a node leaves what is ignored alone until it serves.
signal.signal(signal.SIGINT, signal.default_int_handler)
from llmscale.node import __main__ as node

plan = node.plan_replica

def signalled(*arguments):
    os.kill(os.getpid(), signal.{number})
    return plan(*arguments)

node.plan_replica = signalled
raise SystemExit(node.main())
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_a_node_that_is_ended_while_it_starts_leaves_no_folder(number: signal.Signals, tmp_path: Path) -> None:
    script = SIGNALLED.format(number=number.name)
    command = [sys.executable, "-c", script, "--model=tiny-chat", f"--listen=tcp://127.0.0.1:{free_port()}"]
    surroundings = {**os.environ, "TMPDIR": str(tmp_path)}
    done = subprocess.run(command, env=surroundings, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []
