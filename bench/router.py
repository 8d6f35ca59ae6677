"""How fast is the choice of a replica, what does knowing all caches cost, and what does it find in them?

The program in bench/peers/router is built with the peers named in LLMSCALE_BENCH_PEERS (`kv-index`, `dynamo`: two
crates; nothing of them is part of llmscale). Peers answer the look-up only, and score every replica that holds a part
of the prompt; ours tells the deepest holders apart. With --trace, a Mooncake .jsonl[.gz] is played through 16 replicas
of 3,000 blocks that compute exactly as fast as the trace needs without any cache.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import subprocess
from pathlib import Path

from bench.result import Report, Row
from bench.statistics import spread

PEERS = ("kv-index", "dynamo")
ROOT = Path(__file__).parent.parent
PROGRAM = ROOT / "bench" / "peers" / "router"
TARGET = ROOT / "target" / "router"
REPLICAS = 1_000
TRACE_REPLICAS = 16
TRACE_BLOCKS = 3_000
MAX_SECONDS = 600.0

Figures = dict[tuple[str, str], list[float]]


def main(arguments: argparse.Namespace) -> Report:
    """Every repeat is a process of its own, because memory that is freed does not come back."""
    wanted = {part.partition("=")[0].strip() for part in os.environ.get("LLMSCALE_BENCH_PEERS", "").split(",")}
    peers = [name for name in PEERS if name in wanted]
    program = _build(peers)
    keys, prompts = (1_000_000, 20_000) if arguments.quick else (10_000_000, 100_000)
    sizes = [str(REPLICAS), str(keys), str(prompts), str(arguments.seed)]
    ours: Figures = {}
    for _ in range(arguments.repeats):
        _run([program, "ours", *sizes], ours)
    theirs: dict[str, Figures] = {name: {} for name in peers}
    for name in peers:
        _run([program, name, *sizes], theirs[name])
    rows = []
    for (case, unit), values in ours.items():
        others: dict[str, float | str] = {
            name: spread(found[case, unit]).median for name, found in theirs.items() if (case, unit) in found
        }
        rows.append(Row.of(case, unit, spread(values), peers=others))
    if arguments.trace:
        rows += _conversations(program, Path(arguments.trace))
    return Report("router", arguments.seed, rows)


def _build(peers: list[str]) -> str:
    command = ["cargo", "build", "--release", "--quiet", "--locked", "--manifest-path", str(PROGRAM / "Cargo.toml")]
    command += ["--target-dir", str(TARGET), "--features", ",".join(peers)]
    subprocess.run(command, check=True, timeout=MAX_SECONDS)
    return str(TARGET / "release" / "llmscale-bench-router")


def _run(command: list[str], figures: Figures, text: str | None = None) -> None:
    """Adds what the program tells, one line `case unit value` per figure; a case may have spaces."""
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=True, timeout=MAX_SECONDS)
    for line in done.stdout.splitlines():
        case, unit, value = line.rsplit(" ", 2)
        figures.setdefault((case, unit), []).append(float(value))


def _conversations(program: str, trace: Path) -> list[Row]:
    lines, token_ns = simple_model(trace)
    figures: Figures = {}
    sizes = [str(TRACE_REPLICAS), str(TRACE_BLOCKS), str(token_ns)]
    _run([program, "conversations", *sizes], figures, text="\n".join(lines) + "\n")
    return [Row.of(case, unit, spread(values)) for (case, unit), values in figures.items()]


def simple_model(trace: Path) -> tuple[list[str], int]:
    """The trace as the program reads it, and the nanoseconds per token at which all replicas are just fast enough."""
    content = gzip.decompress(trace.read_bytes()) if trace.suffix == ".gz" else trace.read_bytes()
    requests = [json.loads(line) for line in content.splitlines()]
    lines = [
        " ".join(str(number) for number in (one["timestamp"] * 1_000, one["input_length"], *one["hash_ids"]))
        for one in requests
    ]
    tokens = sum(one["input_length"] for one in requests)
    return lines, round(requests[-1]["timestamp"] * 1_000_000 * TRACE_REPLICAS / tokens)
