"""`python -m tests.triton.run_cases`: runs cases in this process and prints what became of each as one JSON object.

Triton decides when it is imported whether kernels are interpreted, for the whole process, so the interpreter has a
process of its own: the caller sets TRITON_INTERPRET=1. With `--planted` each of the planted bugs is put into a copy of
its kernel file that imports find first, and the cases that must notice are run. What a case raises is its outcome, not
the end of the run.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

import llmscale.layers
from tests.triton.plants import PLANTS, Plant

FAMILIES = ("elementwise_cases", "attention_cases", "sampling_cases", "model_cases")
KERNELS = "llmscale.layers.triton"


@contextmanager
def planted(plant: Plant) -> Iterator[None]:
    """Every import of kernels and cases until the end finds the changed file."""
    original = Path(llmscale.layers.__path__[0], "triton")
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "triton")
        for file in original.rglob("*.py"):
            target = copy / file.relative_to(original)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(file.read_bytes())
        text = (copy / plant.file).read_text(encoding="utf-8")
        assert text.count(plant.old) == 1, f"{plant.old!r} is {text.count(plant.old)} times in {plant.file}"
        (copy / plant.file).write_text(text.replace(plant.old, plant.new), encoding="utf-8")
        forget_modules()
        llmscale.layers.__path__.insert(0, folder)
        importlib.invalidate_caches()
        try:
            yield
        finally:
            llmscale.layers.__path__.remove(folder)
            forget_modules()


def forget_modules() -> None:
    """Kernels, and the cases that have imported them."""
    for name in list(sys.modules):
        if name.startswith(KERNELS) or (name.startswith("tests.triton.") and name.endswith("_cases")):
            del sys.modules[name]


def run(device: torch.device, prefixes: tuple[str, ...]) -> dict[str, dict[str, object]]:
    outcomes: dict[str, dict[str, object]] = {}
    for family in FAMILIES:
        for name, case in importlib.import_module(f"tests.triton.{family}").CASES.items():
            if not name.startswith(prefixes):
                continue
            begin = time.process_time()
            failure = None
            try:
                case(device)
            except Exception as error:  # noqa: BLE001 - the outcome of the case
                failure = f"{type(error).__name__}: {error}"
            outcomes[name] = {"failure": failure, "cpu_seconds": round(time.process_time() - begin, 3)}
    return outcomes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--planted", action="store_true", help="plant bugs, and run the cases that must find them")
    parser.add_argument("prefixes", nargs="*", default=[""], help="beginnings of names of cases, or of bugs")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    device, prefixes = torch.device(arguments.device), tuple(arguments.prefixes)
    outcomes: dict[str, object] = {}
    if arguments.planted:
        for name, plant in PLANTS.items():
            if name.startswith(prefixes):
                with planted(plant):
                    outcomes[name] = run(device, (plant.cases,))
    else:
        outcomes |= run(device, prefixes)
    json.dump(outcomes, sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
