"""Our own products of packed weights on this machine: what is left between them and a model is the executor's.

Builds and runs `rust/kernels/examples/matmul_rates.rs`, which prints a line per format, matrix and number of rows; one
row is told in GB/s of weights, many rows in GOP/s. The matrices are those of S and L. Beside each stands oneDNN's
product (`onednn_products`), matrix by matrix in turns, where torch is installed: what it costs that a row of ours has
the same bits in every batch. Takes about a minute.
"""

from __future__ import annotations

import importlib.util
import re
import statistics
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from bench.result import Row

ROOT = Path(__file__).parent.parent
ROWS = (1, 8, 32, 512)
MATRICES = ("960x576", "3072x576", "576x1536", "2048x2048", "16384x2048", "2048x8192")
ONEDNN = "oneDNN"
MAX_SECONDS = 600
_LINE = re.compile(
    r"(?P<format>\w+) +(?P<outputs>\d+) x +(?P<inputs>\d+), +(?P<rows>\d+) rows: .*? (?P<bytes>[\d.]+) GB/s"
    r" +(?P<rate>[\d.]+) GOP/s \(best (?P<best>[\d.]+)\)"
)


def measure(threads: int) -> list[Row]:
    """Medians of seven rounds, with the best one. The program must have been built before anything is timed."""
    build = ["cargo", "build", "--release", "--quiet", "-p", "llmscale-kernels", "--example", "matmul_rates"]
    subprocess.run(build, cwd=ROOT, check=True, timeout=MAX_SECONDS)
    run = ["cargo", "run", "--release", "--quiet", "-p", "llmscale-kernels", "--example", "matmul_rates", "--"]
    found: list[Row] = []
    for matrix in MATRICES:
        ours = list(parse(_output([*run, str(threads), "", matrix])))
        theirs = {}
        if importlib.util.find_spec("torch") is not None:
            said = _output([sys.executable, "-m", "bench.onednn_products", str(threads), matrix])
            theirs = {row.case: row.value for row in parse(said)}
        found += [replace(row, peers={ONEDNN: theirs.get(row.case, "not installed")}) for row in ours]
    return found


def _output(command: list[str]) -> str:
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True, timeout=MAX_SECONDS)
    return done.stdout


def parse(text: str) -> Iterator[Row]:
    """The rows of the example's output for the numbers of rows that serving has most."""
    for line in text.splitlines():
        found = _LINE.match(line)
        if found is None:
            raise ValueError(f"{line!r} is no line of matmul_rates")
        rows = int(found["rows"])
        if rows not in ROWS:
            continue
        case = f"kernels/{found['format']}/{found['outputs']}x{found['inputs']}/{rows}-rows"
        rate, best = float(found["rate"]), float(found["best"])
        if rows == 1:
            scale = float(found["bytes"]) / rate
            yield Row(case, rate * scale, "GB/s", rate * scale, best * scale, 7)
        else:
            yield Row(case, rate, "GOP/s", rate, best, 7)


def markdown(rows: list[Row]) -> str:
    """A line per format and matrix, a column per number of rows: median (best), and times oneDNN's median."""
    cells: dict[str, dict[str, str]] = {}
    ratios: dict[str, list[float]] = {}
    for row in rows:
        _, kind, matrix, count = row.case.split("/")
        other = row.peers.get(ONEDNN)
        cell = f"{row.value:.0f} ({row.high:.0f}) {row.unit}"
        if isinstance(other, float):
            ratios.setdefault(f"{kind} {count}", []).append(row.value / other)
            cell += f", {row.value / other:.2f}x"
        cells.setdefault(f"{kind} {matrix}", {})[count] = cell
    columns = [f"{rows}-rows" for rows in ROWS]
    lines = [f"| our products, times {ONEDNN}'s | {' | '.join(columns)} |", f"|{' --- |' * (len(columns) + 1)}"]
    lines += [f"| {name} | {' | '.join(found.get(c, '-') for c in columns)} |" for name, found in cells.items()]
    told = [f"{name} {statistics.geometric_mean(found):.2f}x" for name, found in ratios.items()]
    return "\n".join([*lines, *(["", f"Over all matrices (geometric mean): {', '.join(told)}."] if told else [])])
