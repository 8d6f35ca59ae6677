"""What does planning cost? Nanoseconds of one steady decode step in the core, without a model, by running sequences."""

from __future__ import annotations

import argparse

from bench.result import Report, Row
from bench.statistics import spread

RUNNING = (1, 8, 64, 256, 1_024)
_MEASURE = "measure_steady_decode"


def main(arguments: argparse.Namespace) -> Report:
    """Medians over steps; the extremes are those of the steps, so `max` is the worst pause."""
    from llmscale import _core

    measure = getattr(_core, _MEASURE, None)
    if measure is None:
        raise SystemExit(f"this build of the core does not expose {_MEASURE}; build it with `make build`")
    steps = 200 if arguments.quick else 2_000
    rows = []
    for running in RUNNING[:3] if arguments.quick else RUNNING:
        columns = list(zip(*measure(running, steps), strict=True))
        for name, unit, values in zip(
            ("plan", "complete", "hashing", "delta"), ("ns", "ns", "ns", "bytes"), columns, strict=True
        ):
            rows.append(Row.of(f"{name}/{running}", unit, spread(values)))
    return Report("scheduler", arguments.seed, rows)
