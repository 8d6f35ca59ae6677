"""llama.cpp through its own `llama-bench` and `llama-batched-bench` on PATH.

The model must lie beside the folder as FOLDER.gguf (bfloat16). Cases that its programs do not have are left out.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from typing import Any

from bench.peers.script import arguments


def main() -> None:
    """Prints one line per case."""
    given = arguments()
    for case in given.cases.split(","):
        values = _values(given, case)
        if values:
            print(json.dumps({"case": case, "values": values}), flush=True)


def _values(given: argparse.Namespace, case: str) -> list[float]:
    model = f"{given.model}.gguf"
    if case.startswith("prefill") or case == "decode1":
        shape = (
            ["-p", "0", "-n", "64", "-d", "256"]
            if case == "decode1"
            else ["-p", case.removeprefix("prefill"), "-n", "0"]
        )
        fixed = [
            "llama-bench",
            "-m",
            model,
            "-t",
            str(given.threads),
            "-r",
            str(given.repeats),
            "-fa",
            "1",
            "-o",
            "jsonl",
        ]
        return [rate for entry in _lines([*fixed, *shape]) for rate in entry["samples_ts"]]
    prompt_tokens, output_tokens, count = (128, 64, case.removeprefix("batch"))
    if not case.startswith("batch"):
        prompt_tokens, output_tokens, count = (64, 32, case.removeprefix("c"))
    # It rounds a sequence's share of the context down to a multiple of 256, and prints nothing if that is too little.
    context = int(count) * 256 * -(-(prompt_tokens + output_tokens + 8) // 256)
    command = [
        "llama-batched-bench",
        "-m",
        model,
        "-t",
        str(given.threads),
        "-c",
        str(context),
        "-b",
        "2048",
        "-fa",
        "on",
    ]
    command += ["-npp", str(prompt_tokens), "-ntg", str(output_tokens), "-npl", count, "--output-format", "jsonl"]
    return [int(count) * output_tokens / _lines(command)[-1]["t"] for _ in range(given.repeats)]


def _lines(command: list[str]) -> list[dict[str, Any]]:
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


if __name__ == "__main__":
    main()
