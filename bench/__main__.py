"""`python -m bench --list` and `python -m bench NAME [--quick] [--json FILE] [--model DIR] ...`."""

from __future__ import annotations

import argparse
import importlib
import signal
import sys
from pathlib import Path

from bench.result import RESULTS, Report

BENCHES = (
    "cpu",
    "failover",
    "gpu",
    "layouts",
    "offline",
    "offload",
    "quantization",
    "ranks",
    "router",
    "scheduler",
    "serving",
    "start",
    "transport",
)


def main() -> None:
    """Runs one benchmark; without `--json` it prints a table and leaves a plot and the JSON in results/local."""
    arguments = _parser().parse_args()
    if arguments.list or arguments.name is None:
        for name in BENCHES:
            text = importlib.import_module(f"bench.{name}").__doc__ or ""
            print(f"{name:12} {text.splitlines()[0]}")
        return
    if arguments.repeats < 3:
        raise SystemExit(f"--repeats is {arguments.repeats}; a median with a spread needs 3 at least")
    # A time limit's SIGTERM must not leave a server behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    report: Report = importlib.import_module(f"bench.{arguments.name}").main(arguments)
    if arguments.json is not None:
        report.save(arguments.json)
        return
    stem = RESULTS / f"{arguments.name}-{report.date.replace(':', '')[:17]}"
    report.save(stem.with_suffix(".json"))
    report.plot(stem.with_suffix(".png"))
    print(report.table())
    print(f"plot and JSON: {stem}.png, .json")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench", description="Benchmarks; see bench/README.md.")
    add = parser.add_argument
    add("name", nargs="?", choices=BENCHES)
    add("--list", action="store_true", help="names and questions of all benchmarks")
    add("--quick", action="store_true", help="fewer cases and requests: a look, not a figure to publish")
    add("--json", type=Path, metavar="FILE", help="write the result there and print nothing")
    add("--model", help="tiny, S, M or L (random weights), an embedded model, or a folder (default: tiny-chat)")
    add("--repeats", type=int, default=3, help="measurements per case, 3 at least (default: %(default)s)")
    add("--seed", type=int, default=0, help="of prompts and arrivals (default: %(default)s)")
    add("--threads", type=int, help="CPU threads of the model (default: as bench/README.md says)")
    group = parser.add_argument_group("offline").add_argument
    group(
        "--cases",
        help="comma-separated, such as prefill512,decode1,batch8,c16, or of quantization int8,int4-64 (default: all)",
    )
    group = parser.add_argument_group("cpu").add_argument
    group("--peers", type=Path, metavar="FOLDER", help="other runtimes and their models; see bench/README.md")
    group("--schemes", help="comma-separated: bf16,int8,int4 (default: all)")
    group("--runtimes", help="comma-separated: llmscale,llama.cpp,openvino,vllm (default: all)")
    group("--markdown", type=Path, metavar="FILE", help="write the table there too")
    group = parser.add_argument_group("failover").add_argument
    group("--kills", type=int, default=10, help="harms per case, 3 at least (default: %(default)s)")
    group = parser.add_argument_group("cpu and gpu").add_argument
    group("--sections", help="comma-separated, such as offline,served or correctness,int4 (default: all)")
    group("--section-seconds", type=float, default=480.0, help="limit of one of gpu (default: %(default)s)")
    group = parser.add_argument_group("serving").add_argument
    group("--url", help="a server that runs already (default: start llmscale serve)")
    group("--vocabulary", type=int, default=2_000, help="prompt ids are below this (default: %(default)s)")
    group(
        "--trace",
        metavar="FILE",
        help="arrivals: a .csv[.gz] or a Mooncake .jsonl[.gz]; see bench/workload.py",
    )
    group("--speed", type=float, default=1.0, help="plays the trace this much faster (default: %(default)s)")
    group("--max-requests", type=int, default=200, help="of the trace, from its beginning (default: %(default)s)")
    group("--rate", type=float, help="Poisson arrivals per second")
    group("--seconds", type=float, default=60.0, help="of Poisson arrivals, or of saturation (default: %(default)s)")
    group("--prompt-tokens", type=int, default=128, help="mean of Poisson requests (default: %(default)s)")
    group("--output-tokens", type=int, default=32, help="mean of Poisson requests (default: %(default)s)")
    group("--first-token-ms", type=float, default=1_000.0, help="objective for goodput (default: %(default)s)")
    group("--token-ms", type=float, default=50.0, help="objective for goodput (default: %(default)s)")
    return parser


if __name__ == "__main__":
    main()
