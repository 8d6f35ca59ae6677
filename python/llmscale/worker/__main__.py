"""`python -m llmscale.worker`: the process that workers are copied from. Started by a node, never by hand.

It imports everything first. Each copy owns one device; it reads its assignment, one line of JSON, from its own pipe.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import sys
from importlib import import_module

from llmscale import env, logs
from llmscale._core import WorkerSession, end_with_parent
from llmscale.parallel.assignment import WORKER_EXECUTORS, read_assignment
from llmscale.worker.template import name_process, wait_to_be_born


def main() -> int:
    """Imports its executor and waits to be copied; copies connect to the node and compute until told to stop."""
    leave_signals_to_the_node()
    parser = argparse.ArgumentParser(prog="python -m llmscale.worker", description=main.__doc__)
    parser.add_argument("--threads", type=int, help="CPU threads (default: all that the process may use)")
    parser.add_argument("--parent", type=int, required=True, help="the node's process id; all end with it")
    parser.add_argument(
        "--orders", type=int, required=True, help="number of the socket on which the node asks for copies"
    )
    parser.add_argument("--executor", choices=WORKER_EXECUTORS, default="torch", help="what copies compute with")
    arguments = parser.parse_args()
    end_with_parent(arguments.parent)
    orders = socket.socket(fileno=arguments.orders)
    name_process("llmscale-spare")
    logs.configure()
    from llmscale.worker.loop import WorkerLoop

    import_executor(arguments.executor)
    pipe = wait_to_be_born(orders, arguments.parent)
    assignment = None if pipe is None else read_assignment(pipe)
    if assignment is None:
        return 0
    name_process(f"llmscale-rank{assignment.place.rank}")
    keep_to_share_of_cpus(*assignment.share)
    session = WorkerSession(assignment.link, assignment.epoch, assignment.key_file)
    WorkerLoop(session, assignment, arguments.threads).run()
    return 0


def leave_signals_to_the_node() -> None:
    """Ctrl-C and a service manager's SIGTERM reach every process of a group. The node drains then, and needs its
    workers for that; it ends them itself, and the kernel ends them with it. Copies inherit what is set here."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def import_executor(executor: str) -> None:
    """What copies will need, so that none of them has to import it."""
    if executor == "native":
        import_module("llmscale.worker.native_runner")
        return
    env.keep_numpy_to_one_thread()
    env.prepare_for_torch()
    from llmscale.worker.model_runner import warm_up

    warm_up()


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
