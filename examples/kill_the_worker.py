"""Streams an answer, kills the worker in the middle, and shows that the answer goes on.

    python examples/kill_the_worker.py [MODEL]

Starts a node on MODEL (tiny-chat by default), streams through the SDK over ZeroMQ, sends SIGKILL to the worker process at
the thirtieth token, and compares the ids with an undisturbed run of the same seed.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time

from llmscale import Client, SamplingParams
from llmscale.types import RequestOutput

KILL_AT_TOKEN = 30
PARAMS = SamplingParams(max_tokens=200, temperature=0.8, seed=7, ignore_eos=True)


def stream(client: Client, *, kill: bool) -> tuple[tuple[int, ...], float, float, float]:
    """One answer: its ids, seconds to the first token, tokens per second without the gap, the longest gap."""
    began = last = time.perf_counter()
    first = gap = 0.0
    ids: tuple[int, ...] = ()
    text = ""
    for output in client.stream("Once upon a time", PARAMS):
        now = time.perf_counter()
        first, gap, last = first or now - began, max(gap, now - last) if first else 0.0, now
        ids, text = _show(output, text)
        if kill and len(ids) >= KILL_AT_TOKEN:
            kill = False
            pid = client.health().worker_pid
            os.kill(pid, signal.SIGKILL)
            sys.stdout.write(f"\n   ... killed the worker (process {pid}) ...\n")
    sys.stdout.write("\n\n")
    return ids, first, len(ids) / (last - began - gap), gap


def _show(output: RequestOutput, shown: str) -> tuple[tuple[int, ...], str]:
    choice = output.outputs[0]
    sys.stdout.write(choice.text[len(shown) :])
    sys.stdout.flush()
    return choice.token_ids, choice.text


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
                undisturbed, *_ = stream(client, kill=False)
                sys.stdout.write("-- with a killed worker\n")
                survived, first, rate, gap = stream(client, kill=True)
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
