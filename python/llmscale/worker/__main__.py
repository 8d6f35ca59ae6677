"""`python -m llmscale.worker`: the process that owns one device. Started by a node, never by hand."""

from __future__ import annotations

import argparse
import os
import sys

from llmscale import env, logs
from llmscale._core import WorkerSession, end_with_parent


def main() -> int:
    """Connects to the node that started this process and computes steps until told to stop."""
    parser = argparse.ArgumentParser(prog="python -m llmscale.worker", description=main.__doc__)
    parser.add_argument("--link", required=True, help="address of the engine's link")
    parser.add_argument("--epoch", type=int, required=True, help="incarnation of this worker")
    parser.add_argument("--threads", type=int, help="CPU threads (default: all that the process may use)")
    arguments = parser.parse_args()
    end_with_parent(os.getppid())
    logs.configure()
    env.prepare_for_torch()
    # Connected before torch is imported, so that the engine's configuration is there when the import is done.
    session = WorkerSession(arguments.link, arguments.epoch)
    from llmscale.worker.loop import WorkerLoop

    WorkerLoop(session, arguments.threads).run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
