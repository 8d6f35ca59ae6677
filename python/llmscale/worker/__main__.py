"""`python -m llmscale.worker`: the process that owns one device. Started by a node, never by hand.

It imports everything first and then reads its assignment, one line of JSON, from standard input: a spare waits there
until it is needed.
"""

from __future__ import annotations

import argparse
import os
import sys

from llmscale import env, logs
from llmscale._core import WorkerSession, end_with_parent


def main() -> int:
    """Imports torch, waits for an assignment, connects to the node and computes steps until told to stop."""
    parser = argparse.ArgumentParser(prog="python -m llmscale.worker", description=main.__doc__)
    parser.add_argument("--threads", type=int, help="CPU threads (default: all that the process may use)")
    parser.add_argument("--parent", type=int, required=True, help="the node's process id; the worker ends with it")
    arguments = parser.parse_args()
    end_with_parent(arguments.parent)
    logs.configure()
    env.prepare_for_torch()
    from llmscale.parallel.assignment import read_assignment
    from llmscale.worker.loop import WorkerLoop, warm_up

    warm_up()
    assignment = read_assignment(sys.stdin.buffer)
    if assignment is None:
        return 0
    keep_to_share_of_cpus(*assignment.share)
    session = WorkerSession(assignment.link, assignment.epoch, assignment.key_file)
    WorkerLoop(session, assignment, arguments.threads).run()
    return 0


def keep_to_share_of_cpus(index: int, ranks: int) -> None:
    """Gives each of a host's ranks CPUs of its own where there are enough.

    Ranks that meet in memory wait for each other every few hundred microseconds. Left to the system two of them often
    shared one of two cores, and a sum took 33 us instead of 1.
    """
    cpus = sorted(os.sched_getaffinity(0))
    if 1 < ranks <= len(cpus):
        first, last = (len(cpus) * rank // ranks for rank in (index, index + 1))
        os.sched_setaffinity(0, cpus[first:last])


if __name__ == "__main__":
    sys.exit(main())
