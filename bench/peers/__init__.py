"""Other runtimes on the same cases, each in its own environment and process.

`LLMSCALE_BENCH_PEERS=transformers=/path/to/python,vllm=/path/to/python` names them; llama.cpp needs `llama-bench` on
PATH instead. A script of this folder is run there and prints one JSON line per case: {"case", "values"}. One that is
not configured is a column that says "not installed", one that fails says so. Knows nothing of what the cases mean.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from bench.statistics import Spread, spread

VARIABLE = "LLMSCALE_BENCH_PEERS"
PYTHON_PEERS = ("transformers", "vllm", "openvino")
NOT_INSTALLED = "not installed"
MAX_SECONDS = 3_600


@dataclass(frozen=True, slots=True)
class Task:
    """What every peer is asked to run."""

    model: Path
    vocabulary: int
    cases: tuple[str, ...]
    repeats: int
    seed: int
    threads: int | None
    scheme: str = "bf16"
    """Of the weights; for runtimes that choose it while they load."""


def configured(setting: str | None = None) -> dict[str, str]:
    """Which Python runs which peer. Raises ValueError for a setting that cannot be read."""
    setting = os.environ.get(VARIABLE, "") if setting is None else setting
    found: dict[str, str] = {}
    for entry in filter(None, (part.strip() for part in setting.split(","))):
        name, separator, path = entry.partition("=")
        if not separator or name not in PYTHON_PEERS:
            raise ValueError(f"{VARIABLE} has {entry!r}; write NAME=PYTHON with a name of {', '.join(PYTHON_PEERS)}")
        found[name] = path
    return found


def run_all(task: Task) -> dict[str, dict[str, float | str] | str]:
    """Medians by case of every peer, one peer after the other, or why there are none."""
    pythons = configured()
    results: dict[str, dict[str, float | str] | str] = {}
    for name in PYTHON_PEERS:
        results[name] = _medians(pythons[name], name, task) if name in pythons else NOT_INSTALLED
    has_llamacpp = shutil.which("llama-bench") is not None
    results["llama.cpp"] = _medians(sys.executable, "llamacpp", task) if has_llamacpp else NOT_INSTALLED
    return results


def _medians(python: str, name: str, task: Task) -> dict[str, float | str] | str:
    found = measure(python, name, task)
    return found if isinstance(found, str) else {case: measured.median for case, measured in found.items()}


def measure(
    python: str | Path, name: str, task: Task, *, environment: Mapping[str, str] | None = None
) -> dict[str, Spread] | str:
    """Runs the script `name` of this folder with this Python, in this process's environment with `environment` over it.
    What was measured before a failure is kept; "failed" where nothing was.
    """
    root = Path(__file__).parent.parent.parent
    command = [str(python), "-m", f"bench.peers.{name}", "--model", str(task.model)]
    command += ["--vocabulary", str(task.vocabulary), "--scheme", task.scheme]
    command += ["--cases", ",".join(task.cases), "--repeats", str(task.repeats), "--seed", str(task.seed)]
    command += ["--threads", str(task.threads or len(os.sched_getaffinity(0)))]
    given = os.environ | (environment or {})
    try:
        done = subprocess.run(
            command, cwd=root, capture_output=True, text=True, timeout=MAX_SECONDS, env=given, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        print(f"{name}: {error}", file=sys.stderr)
        return "failed"
    if done.returncode != 0:
        print(f"{name} ended with code {done.returncode}:\n{done.stderr[-2_000:]}", file=sys.stderr)
    found = parse(done.stdout)
    return found if found else "failed"


def parse(output: str) -> dict[str, Spread]:
    """What a peer's output says by case; lines that are not its JSON are its library's chatter."""
    found: dict[str, Spread] = {}
    for line in output.splitlines():
        if not line.startswith('{"case"'):
            continue
        entry = json.loads(line)
        found[entry["case"]] = spread(entry["values"])
    return found
