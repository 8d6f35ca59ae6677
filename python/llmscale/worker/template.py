"""The worker's side of its birth: a process that has imported torch, and that copies of it are made from.

Forking it takes milliseconds where importing torch takes seconds. It forks twice and lets the one between end, so that
the node, which adopts orphans, is the parent of every worker: the template may die without a worker that notices, and
no worker outlives its node. Nothing may have started a thread before, because a fork copies only the one that calls it.
Knows no assignments; what a worker is told comes through its own pipe.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import BinaryIO

from llmscale._core import end_with_parent
from llmscale.errors import WorkerError

PID_BYTES = 4


def wait_to_be_born(orders: socket.socket, node: int) -> BinaryIO | None:
    """Makes a copy of this process for each pipe that comes with an order, and answers with the copy's process id.

    Returns in the copies with the pipe; in the template with None, when the node has closed the socket.
    """
    check_alone()
    while True:
        _, descriptors, _, _ = socket.recv_fds(orders, 1, 1)
        if not descriptors:
            return None
        (pipe,) = descriptors
        pid = _fork(node)
        if pid is None:
            orders.close()
            return os.fdopen(pipe, "rb")
        os.close(pipe)
        orders.send(pid.to_bytes(PID_BYTES, "little"))


def check_alone() -> None:
    """Raises WorkerError if this process has threads that its copies would lack, with their locks held for ever."""
    tasks = sorted(Path("/proc/self/task").iterdir())
    if len(tasks) > 1:
        names = ", ".join((task / "comm").read_text().strip() for task in tasks)
        raise WorkerError(f"importing torch has started threads ({names}), so workers cannot be copied from here")


def name_process(name: str) -> None:
    """What `ps` and `top` show; copies have the command line of their template. 15 characters at most."""
    assert len(name) <= 15, name
    Path("/proc/self/comm").write_text(name)


def _fork(node: int) -> int | None:
    """None in the copy, whose parent is the node by then; its process id in the template.

    Raises WorkerError if the process between could not make the copy, and OSError if there is not even that.
    """
    told_pid, tell_pid = os.pipe()
    orphaned, let_go = os.pipe()
    between = os.fork()
    if between == 0:
        try:
            copy = os.fork()
        except OSError:
            # No process or no memory is left. The template says so; a second one must not go on as if it were it.
            os._exit(1)
        if copy != 0:
            os.write(tell_pid, copy.to_bytes(PID_BYTES, "little"))
            os._exit(0)
        for descriptor in (told_pid, tell_pid, let_go):
            os.close(descriptor)
        # Until the template has seen the end of the process between: then this one has been adopted.
        os.read(orphaned, 1)
        os.close(orphaned)
        end_with_parent(node)
        return None
    # Or reading would wait for this process itself, where nothing was written.
    os.close(tell_pid)
    os.waitpid(between, 0)
    told = os.read(told_pid, PID_BYTES)
    for descriptor in (told_pid, orphaned, let_go):
        os.close(descriptor)
    if len(told) < PID_BYTES:
        raise WorkerError("no worker can be copied from here: the system has no process or no memory left")
    return int.from_bytes(told, "little")
