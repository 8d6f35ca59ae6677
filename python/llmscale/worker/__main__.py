"""`python -m llmscale.worker`: the process that owns one device. Started by a node, never by hand.

It imports everything first and then reads its assignment, one line of JSON, from standard input: a spare waits there
until it is needed.
"""

from __future__ import annotations

import argparse
import sys

import msgspec

from llmscale import env, logs
from llmscale._core import WorkerSession, end_with_parent
from llmscale.errors import WorkerError

MAX_ASSIGNMENT_BYTES = 4_096


class Assignment(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which engine to serve, as which incarnation."""

    link: str
    epoch: int


def main() -> int:
    """Imports torch, waits for an assignment, connects to the node and computes steps until told to stop."""
    parser = argparse.ArgumentParser(prog="python -m llmscale.worker", description=main.__doc__)
    parser.add_argument("--threads", type=int, help="CPU threads (default: all that the process may use)")
    parser.add_argument("--parent", type=int, required=True, help="the node's process id; the worker ends with it")
    arguments = parser.parse_args()
    end_with_parent(arguments.parent)
    logs.configure()
    env.prepare_for_torch()
    from llmscale.worker.loop import WorkerLoop, warm_up

    warm_up()
    assignment = read_assignment()
    if assignment is None:
        return 0
    WorkerLoop(WorkerSession(assignment.link, assignment.epoch), arguments.threads).run()
    return 0


def read_assignment() -> Assignment | None:
    """Waits for one line. None: the node closed the pipe, this process is not needed. Raises WorkerError."""
    line = sys.stdin.buffer.readline(MAX_ASSIGNMENT_BYTES)
    if not line:
        return None
    try:
        return msgspec.json.decode(line, type=Assignment)
    except msgspec.DecodeError as error:
        raise WorkerError(f"a worker is started by a node, which tells it its link and epoch; got {line!r}") from error


if __name__ == "__main__":
    sys.exit(main())
