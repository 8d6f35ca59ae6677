"""How long from the command to the first token, and how much memory does the idle server hold?

`llmscale serve MODEL` from a cold process, but with the model's files in the page cache: to the first healthy answer,
to the first token of a first request, and the resident memory of all its processes then (shared pages counted in each).
Then a fleet of two nodes and a gateway, started at once: to both nodes being ready and to the first token. Last
`LLM(MODEL)` in a process of its own, from the command to the first token, and that process's memory.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import time

from bench.fleet import fleet
from bench.load import Outcome
from bench.raw_http import RawClient
from bench.result import Report, Row
from bench.server import installed_environment, resident_bytes, serving
from bench.shapes import SHAPES, model_folder
from bench.statistics import spread
from bench.workload import Arrival

OFFLINE = """
import json, sys
from llmscale import LLM, SamplingParams
llm = LLM(sys.argv[1], threads=json.loads(sys.argv[2]))
llm.generate([[300] * 8], SamplingParams(max_tokens=1, ignore_eos=True))
print(open("/proc/self/statm").read().split()[1])
"""


def main(arguments: argparse.Namespace) -> Report:
    """Starts and ends everything `--repeats` times."""
    from llmscale.models.locate import locate_model, model_name

    name = arguments.model or "tiny-chat"
    model = str(model_folder(name)) if name in SHAPES else name
    served = model_name(model, locate_model(model))
    ready, first, memory = [], [], []
    fleet_ready, fleet_first = [], []
    offline_first, offline_memory = [], []
    for _ in range(arguments.repeats):
        with serving(model, threads=arguments.threads) as (port, group, seconds):
            ready.append(seconds)
            first.append(seconds + asyncio.run(_first_token(port, served)))
            memory.append(resident_bytes(group) / (1 << 20))
        started = time.perf_counter()
        options = () if arguments.threads is None else ("--threads", str(arguments.threads))
        with fleet(model, 2, *options) as running:
            fleet_ready.append(time.perf_counter() - started)
            fleet_first.append(fleet_ready[-1] + asyncio.run(_first_token(running.port, served)))
        seconds, megabytes = _offline(model, arguments.threads)
        offline_first.append(seconds)
        offline_memory.append(megabytes)
    rows = [
        Row.of(f"{name}/ready", "s", spread(ready)),
        Row.of(f"{name}/first-token", "s", spread(first)),
        Row.of(f"{name}/resident", "MiB", spread(memory)),
        Row.of(f"{name}/two-nodes/ready", "s", spread(fleet_ready)),
        Row.of(f"{name}/two-nodes/first-token", "s", spread(fleet_first)),
        Row.of(f"{name}/offline/first-token", "s", spread(offline_first)),
        Row.of(f"{name}/offline/resident", "MiB", spread(offline_memory)),
    ]
    return Report("start", arguments.seed, rows)


def _offline(model: str, threads: int | None) -> tuple[float, float]:
    """Seconds from the command to the first token, and MiB at that moment."""
    command = [sys.executable, "-c", OFFLINE, model, json.dumps(threads)]
    started = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=installed_environment()) as process:
        assert process.stdout is not None
        pages = process.stdout.readline()
        seconds = time.perf_counter() - started
        if process.wait() != 0:
            raise RuntimeError(f"`{' '.join(command)}` ended with code {process.returncode}")
    return seconds, int(pages) * os.sysconf("SC_PAGE_SIZE") / (1 << 20)


async def _first_token(port: int, model: str) -> float:
    client = RawClient("127.0.0.1", port, model, stream=True)
    outcome = Outcome(time.perf_counter())
    await client.send([300] * 8, Arrival(0, 8, 8), outcome)
    await client.close()
    if outcome.error is not None:
        raise RuntimeError(f"the first request failed: {outcome.error}")
    return outcome.first_token_seconds
