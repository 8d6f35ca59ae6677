"""What every peer's script shares: its arguments and its output. Runs in the peer's own environment, so it needs
nothing but the standard library.
"""

from __future__ import annotations

import argparse
import json

from bench.offline_cases import Generate, run_cases


def arguments() -> argparse.Namespace:
    """As `bench.peers` passes them."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--vocabulary", type=int, required=True)
    parser.add_argument("--cases", required=True)
    parser.add_argument("--repeats", type=int, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--scheme", default="bf16", help="of the weights, where they are not written in the model")
    return parser.parse_args()


def report(given: argparse.Namespace, generate: Generate) -> None:
    """Runs the cases and prints one line each."""
    found = run_cases(generate, given.vocabulary, given.cases.split(","), given.repeats, given.seed)
    for case, values in found.items():
        print(json.dumps({"case": case, "values": values}), flush=True)
