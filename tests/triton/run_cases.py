"""`python -m tests.triton.run_cases`: runs cases in this process and prints what became of each as one JSON object.

Triton decides when it is imported whether kernels are interpreted, for the whole process, so the interpreter has a
process of its own: the caller sets TRITON_INTERPRET=1. With `--plant FILE OLD NEW` a kernel file is changed first; the
changed copy shadows the original. Exceptions of a case are its outcome, not the end of the run.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import tempfile
import time
from pathlib import Path

import torch

import llmscale.layers.triton as kernels

FAMILIES = ("elementwise_cases", "attention_cases", "sampling_cases")


def plant(folder: Path, file: str, old: str, new: str) -> None:
    """Writes a changed copy of a kernel file to `folder` and lets imports find it first."""
    source = Path(kernels.__path__[0], file)
    text = source.read_text(encoding="utf-8")
    assert text.count(old) == 1, f"{old!r} is {text.count(old)} times in {file}"
    target = folder / file
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text.replace(old, new), encoding="utf-8")
    kernels.__path__.insert(0, str(folder))


def run(device: torch.device, prefixes: tuple[str, ...]) -> dict[str, dict[str, object]]:
    outcomes: dict[str, dict[str, object]] = {}
    for family in FAMILIES:
        for name, case in importlib.import_module(f"tests.triton.{family}").CASES.items():
            if not name.startswith(prefixes):
                continue
            begin = time.monotonic()
            failure = None
            try:
                case(device)
            except Exception as error:  # noqa: BLE001 - the outcome of the case
                failure = f"{type(error).__name__}: {error}"
            outcomes[name] = {"failure": failure, "seconds": round(time.monotonic() - begin, 3)}
    return outcomes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--plant", nargs=3, metavar=("FILE", "OLD", "NEW"))
    parser.add_argument("prefixes", nargs="*", default=[""], help="beginnings of names of cases")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        if arguments.plant:
            plant(Path(folder), *arguments.plant)
        outcomes = run(torch.device(arguments.device), tuple(arguments.prefixes))
    json.dump(outcomes, sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
