"""The result of a benchmark: rows of cases with spread, the machine's limits beside them, as JSON, a table or a plot.

A row that a limit of the machine bounds states its share of it, so that figures of different machines can be compared.
O(rows). Knows nothing of how anything was measured.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.statistics import Spread

RESULTS = Path(__file__).parent / "results" / "local"


def _commit() -> str:
    root = Path(__file__).parent.parent
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=10"], cwd=root, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or "unknown"


def _machine() -> str:
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / (1 << 30)
    return f"{model}, {len(os.sched_getaffinity(0))} CPUs, {memory:.0f} GiB"


@dataclass(frozen=True, slots=True)
class Row:
    """One case. `limit_share` is the value's share of what the machine can do, None where no limit is known.

    `peers` holds the same case of other runtimes: a value, or why there is none.
    """

    case: str
    value: float
    unit: str
    low: float
    high: float
    repeats: int
    limit_share: float | None = None
    peers: dict[str, float | str] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        case: str,
        unit: str,
        measured: Spread,
        *,
        limit: float | None = None,
        peers: dict[str, float | str] | None = None,
    ) -> Row:
        """A row of a spread; `limit` is the most that the machine could reach, in the same unit."""
        share = measured.median / limit if limit else None
        return cls(case, measured.median, unit, measured.low, measured.high, measured.repeats, share, peers or {})

    def to_json(self) -> dict[str, Any]:
        """The row's object, with the short names of the extremes."""
        return {
            "case": self.case,
            "value": self.value,
            "unit": self.unit,
            "min": self.low,
            "max": self.high,
            "repeats": self.repeats,
            "limit_share": self.limit_share,
            "peers": self.peers,
        }


@dataclass(frozen=True, slots=True)
class Report:
    """All rows of one run."""

    bench: str
    seed: int
    rows: list[Row]
    limits: dict[str, float] = field(default_factory=dict)
    commit: str = field(default_factory=_commit)
    date: str = field(default_factory=lambda: datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"))
    machine: str = field(default_factory=_machine)

    def to_json(self) -> dict[str, Any]:
        """The whole report."""
        return {
            "bench": self.bench,
            "commit": self.commit,
            "date": self.date,
            "machine": self.machine,
            "seed": self.seed,
            "limits": self.limits,
            "rows": [row.to_json() for row in self.rows],
        }

    def save(self, path: Path) -> None:
        """Writes the JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.to_json(), indent=1) + "\n", encoding="utf-8")

    def table(self) -> str:
        """The rows as text, one line each."""
        peers = sorted({name for row in self.rows for name in row.peers})
        head = ["case", "value", "unit", "min - max", "n", "of limit", *peers]
        lines = [head]
        for row in self.rows:
            share = "-" if row.limit_share is None else f"{row.limit_share:.0%}"
            others = [_cell(row.peers.get(name, "-")) for name in peers]
            cells = [row.case, _cell(row.value), row.unit, f"{_cell(row.low)} - {_cell(row.high)}", str(row.repeats)]
            lines.append([*cells, share, *others])
        widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
        shown = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
        ]
        limits = ", ".join(f"{name} {_cell(value)}" for name, value in self.limits.items())
        return "\n".join([f"{self.bench} at {self.commit} on {self.machine}", f"limits: {limits or 'none'}", *shown])

    def plot(self, path: Path) -> None:
        """A bar per row with its extremes, one panel per unit, as a PNG."""
        import matplotlib as mpl

        mpl.use("Agg")
        from matplotlib import pyplot

        units = list(dict.fromkeys(row.unit for row in self.rows))
        height = 1.0 + 0.3 * len(self.rows) + 0.7 * len(units)
        sizes = [sum(row.unit == unit for row in self.rows) for unit in units]
        figure, panels = pyplot.subplots(len(units), 1, figsize=(8, height), squeeze=False, height_ratios=sizes)
        for unit, (panel,) in zip(units, panels, strict=True):
            rows = [row for row in self.rows if row.unit == unit][::-1]
            errors = [[row.value - row.low for row in rows], [row.high - row.value for row in rows]]
            panel.barh([row.case for row in rows], [row.value for row in rows], xerr=errors, color="#4878a8", capsize=3)
            panel.set_xlabel(unit)
        figure.suptitle(f"{self.bench} ({self.commit})")
        figure.tight_layout()
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=110)
        pyplot.close(figure)


def _cell(value: float | str) -> str:
    if isinstance(value, str):
        return value
    return f"{value:,.0f}" if abs(value) >= 1_000 else f"{value:.4g}"
