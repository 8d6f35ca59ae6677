"""Our own products of packed weights on this machine: what is left between them and a model is the executor's.

Builds and runs `rust/kernels/examples/matmul_rates.rs`, which prints a line per format, matrix and number of rows; one
row is told in GB/s of weights, many rows in GOP/s. The matrices are those of S and L. Takes about a minute.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

from bench.result import Row

ROOT = Path(__file__).parent.parent
ROWS = (1, 8, 32, 512)
MAX_SECONDS = 600
_LINE = re.compile(
    r"(?P<format>\w+) +(?P<outputs>\d+) x +(?P<inputs>\d+), +(?P<rows>\d+) rows: .*? (?P<bytes>[\d.]+) GB/s"
    r" +(?P<rate>[\d.]+) GOP/s \(best (?P<best>[\d.]+)\)"
)


def measure(threads: int) -> list[Row]:
    """Medians of seven rounds, with the best one. The program must have been built before anything is timed."""
    command = ["cargo", "build", "--release", "--quiet", "-p", "llmscale-kernels", "--example", "matmul_rates"]
    subprocess.run(command, cwd=ROOT, check=True, timeout=MAX_SECONDS)
    command[1:3] = ["run", "--release"]
    command += ["--", str(threads)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=MAX_SECONDS)
    return list(parse(done.stdout))


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
    """A line per format and matrix, a column per number of rows: median (best)."""
    cells: dict[str, dict[str, str]] = {}
    for row in rows:
        _, kind, matrix, count = row.case.split("/")
        cells.setdefault(f"{kind} {matrix}", {})[count] = f"{row.value:.0f} ({row.high:.0f}) {row.unit}"
    columns = [f"{rows}-rows" for rows in ROWS]
    lines = [f"| our products | {' | '.join(columns)} |", f"|{' --- |' * (len(columns) + 1)}"]
    lines += [f"| {name} | {' | '.join(found.get(c, '-') for c in columns)} |" for name, found in cells.items()]
    return "\n".join(lines)
