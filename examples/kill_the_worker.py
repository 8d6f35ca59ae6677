"""Streams an answer, kills the worker in the middle, and shows that the answer goes on.

    python examples/kill_the_worker.py [MODEL]

Starts a node on MODEL (tiny-chat by default), streams through the SDK over ZeroMQ, sends SIGKILL to the worker process
at the thirtieth token, and compares the ids with an undisturbed run of the same seed.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time

import psutil

from llmscale import Client, SamplingParams

KILL_AT_TOKEN = 30
PARAMS = SamplingParams(max_tokens=300, temperature=0.8, seed=7, ignore_eos=True)


def stream(client: Client, worker: psutil.Process | None) -> tuple[list[int], float, float, float]:
    """One answer: its ids, seconds to the first token, tokens per second without the longest gap, that gap.

    `worker` is killed at the thirtieth token.
    """
    began = last = time.perf_counter()
    first = gap = 0.0
    ids: list[int] = []
    for chunk in client.stream("Once upon a time", PARAMS):
        now = time.perf_counter()
        if ids:
            gap = max(gap, now - last)
        else:
            first = now - began
        last = now
        ids += chunk.token_ids
        sys.stdout.write(chunk.text)
        sys.stdout.flush()
        if worker is not None and len(ids) >= KILL_AT_TOKEN:
            worker.kill()
            sys.stdout.write(f"\n\n   ... killed the worker (process {worker.pid}) ...\n\n")
            worker = None
    sys.stdout.write("\n\n")
    return ids, first, len(ids) / (last - began - gap), gap


def main() -> int:
    """Returns 0 if both runs gave the same ids."""
    model = sys.argv[1] if len(sys.argv) > 1 else "tiny-chat"
    with tempfile.TemporaryDirectory() as folder:
        address = f"ipc://{folder}/node"
        command = [sys.executable, "-m", "llmscale.node", "--model", model, "--listen", address, "--dtype", "float32"]
        node = subprocess.Popen([*command, "--parent", str(os.getpid())])
        try:
            with Client(address, tokenizer=model) as client:
                sys.stdout.write("-- undisturbed\n")
                undisturbed, *_ = stream(client, None)
                sys.stdout.write("-- with a killed worker\n")
                # The oldest child is the spare, the youngest is the copy of it that works.
                worker = max(psutil.Process(node.pid).children(), key=psutil.Process.create_time)
                survived, first, rate, gap = stream(client, worker)
        finally:
            node.terminate()
            node.wait()
    same = survived == undisturbed
    sys.stdout.write(
        f"first token {first * 1e3:.0f} ms, {rate:.0f} tokens/s, gap at the worker's death {gap:.2f} s,"
        f" ids {'equal' if same else 'DIFFER'}\n"
    )
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
