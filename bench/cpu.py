"""Where does the CPU executor stand beside its peers? Cases of S, M and L, servers, mixed load, starts, in one run.

Sections: limits (always), kernels, offline, odd, served, mixed, tiny, start. Peers are measured in the same run
(`--peers FOLDER`, see bench/README.md) and stand beside us as columns. Prints Markdown: the questions with their least
and their aim, then every variant. `--quick` takes fewer cases and three repetitions, otherwise there are five at least.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, field

from bench import cpu_kernels, cpu_limits
from bench.cpu_cases import MAX_OTHERS_SHARE, OURS, Lineup, Measured, Variant, choose, machine_for_us, run_offline
from bench.cpu_servers import Measure, measure_servers, measure_starts, mixed, served, tiny
from bench.cpu_table import QUESTIONS, markdown
from bench.result import Report, Row
from bench.shapes import SHAPES
from bench.statistics import Spread

CASES = ("prefill512", "prefill2048", "decode1", "batch8", "batch32")
QUICK_CASES = ("prefill512", "decode1", "batch8")
MODELS = ("S", "M", "L")
REPEATS = 5
QUICK_REPEATS = 3
SECTIONS = ("limits", "kernels", "offline", "odd", "served", "mixed", "tiny", "start")
ODD_CASES = ("prefill512", "decode1", "batch8")

UNITS = {(question.model, question.case): question.unit for question in QUESTIONS}


@dataclass
class Run:
    """What sections are given, and where they put what they measure."""

    lineup: Lineup
    models: tuple[str, ...]
    cases: tuple[str, ...]
    repeats: int
    seed: int
    threads: int
    quick: bool
    measured: Measured = field(default_factory=dict)
    limits: dict[str, float] = field(default_factory=dict)
    kernels: list[Row] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class CpuReport(Report):
    """A report whose table is Markdown."""

    measured: Measured = field(default_factory=dict)
    others: dict[str, float] = field(default_factory=dict)

    def table(self) -> str:
        """The heading, the limits, the questions and the grid."""
        limits = ", ".join(f"{name} {value:.4g}" for name, value in self.limits.items())
        shares = {_key(row): row.limit_share for row in self.rows}
        head = f"cpu at {self.commit} on {self.machine}, {self.date}, seed {self.seed}"
        kernels = [row for row in self.rows if row.case.startswith("kernels/")]
        parts = [head, f"limits: {limits}", self._disturbances(), markdown(self.measured, shares)]
        return "\n\n".join([*parts, *([cpu_kernels.markdown(kernels)] if kernels else [])])

    def _disturbances(self) -> str:
        disturbed = {name: share for name, share in self.others.items() if share > MAX_OTHERS_SHARE}
        if not disturbed:
            return f"Nothing else used more than {MAX_OTHERS_SHARE:.0%} of the machine while anything was measured."
        return f"Disturbed: {', '.join(f'{name} ({share:.0%})' for name, share in disturbed.items())}."


def main(arguments: argparse.Namespace) -> Report:
    """Runs the sections that `--sections` names, all by default."""
    run = _run_of(arguments)
    names = SECTIONS if arguments.sections is None else tuple(arguments.sections.split(","))
    if unknown := sorted(set(names) - set(SECTIONS)):
        raise SystemExit(f"--sections has {', '.join(unknown)}; there are {', '.join(SECTIONS)}")
    run.limits |= _limits(run, "before")
    try:
        _sections(run, names)
        # Bandwidth of virtual machines drifts within minutes: a run that it changed in is not one run.
        run.limits |= {f"{name}_after": value for name, value in _limits(run, "after").items()}
    except (KeyboardInterrupt, SystemExit):
        # A run takes an hour: what one that is ended has measured is told.
        print(f"ended before all was measured\n{_report(run, arguments).table()}", file=sys.stderr)
        raise
    return _report(run, arguments)


def _sections(run: Run, names: tuple[str, ...]) -> None:
    if "kernels" in names:
        with machine_for_us(run.lineup.others, "kernels"):
            run.kernels += cpu_kernels.measure(run.threads)
    if "offline" in names:
        for model in run.models:
            run_offline(run.lineup, model, run.cases, run.repeats, run.seed, run.threads, run.measured)
    if "odd" in names:
        # Ours alone: it is held to our own share of the limits on S.
        run_offline(run.lineup.of(OURS), "odd", ODD_CASES, run.repeats, run.seed, run.threads, run.measured)
    _servers(run, names)


def _report(run: Run, arguments: argparse.Namespace) -> CpuReport:
    rows = [*run.kernels, *_rows(run, run.limits), *_others(run.lineup.others)]
    report = CpuReport("cpu", run.seed, rows, run.limits, measured=run.measured, others=run.lineup.others)
    if arguments.markdown is not None:
        arguments.markdown.parent.mkdir(parents=True, exist_ok=True)
        arguments.markdown.write_text(report.table() + "\n", encoding="utf-8")
    return report


def _run_of(arguments: argparse.Namespace) -> Run:
    models = MODELS if arguments.model is None else tuple(arguments.model.split(","))
    if unknown := sorted(set(models) - set(SHAPES)):
        raise SystemExit(f"--model has {', '.join(unknown)}; there are {', '.join(SHAPES)}")
    cases = QUICK_CASES if arguments.quick else CASES
    try:
        lineup = choose(arguments.peers, arguments.schemes, arguments.runtimes)
    except ValueError as error:
        raise SystemExit(str(error)) from error
    return Run(
        lineup=lineup,
        models=models,
        cases=tuple(arguments.cases.split(",")) if arguments.cases else cases,
        repeats=QUICK_REPEATS if arguments.quick else max(REPEATS, arguments.repeats),
        seed=arguments.seed,
        threads=arguments.threads or 2,
        quick=arguments.quick,
    )


def _limits(run: Run, when: str) -> dict[str, float]:
    with machine_for_us(run.lineup.others, f"limits {when}"):
        found = cpu_limits.measure(run.threads)
    print(f"limits {when}: {', '.join(f'{name} {value:.4g}' for name, value in found.items())}", file=sys.stderr)
    return found


def _servers(run: Run, names: tuple[str, ...]) -> None:
    """Loads on S share a server: vLLM takes minutes to start."""
    loads: dict[str, Measure] = {"served": served, "mixed": mixed}
    settings = (run.repeats, run.seed, run.threads)
    if measures := [measure for name, measure in loads.items() if name in names]:
        measure_servers(run.lineup, "S", measures, *settings, run.measured)
    if "tiny" in names:
        measure_servers(run.lineup.only("bf16"), "tiny", [tiny], *settings, run.measured)
    if "start" in names:
        measure_starts(run.lineup, "S", *settings, run.measured)


def _rows(run: Run, limits: dict[str, float]) -> list[Row]:
    """A row per variant and case; ours have the same case of every peer in the same class beside them."""
    return [
        Row.of(
            f"{model}/{case}/{variant.label}" + ("" if variant.runtime == OURS else f"@{variant.runtime}"),
            UNITS.get((model, case), "tokens/s"),
            value,
            limit=cpu_limits.limit_of(case, variant.scheme, SHAPES[model], limits),
            peers=_peers(run.measured, variant, model, case) if variant.runtime == OURS else None,
        )
        for (variant, model, case), value in run.measured.items()
        if isinstance(value, Spread)
    ]


def _others(shares: dict[str, float]) -> list[Row]:
    return [Row(f"others/{name}", share, "of the machine", share, share, 1) for name, share in shares.items()]


def _peers(measured: Measured, ours: Variant, model: str, case: str) -> dict[str, float | str]:
    return {
        variant.name: value if isinstance(value, str) else value.median
        for (variant, of_model, of_case), value in measured.items()
        if variant.runtime != OURS and variant.scheme == ours.scheme and (of_model, of_case) == (model, case)
    }


def _key(row: Row) -> tuple[str, str, str]:
    """(scheme, model, case) of one of our rows."""
    model, _, rest = row.case.partition("/")
    case, _, scheme = rest.rpartition("/")
    return scheme, model, case
