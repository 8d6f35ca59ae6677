"""How near do the CUDA kernels come to what the device can do, and are they right?

Ceilings first (copy, bfloat16 products, the link), then correctness against float64, weight matmuls over the shapes of
Llama models and batches of 1 to 256, paged attention, sampling, KV block copies, whole decode steps, and serving. A
section that fails costs only itself, and one that takes longer than `--section-seconds` leaves out its last cases; both
are rows of the report. Needs a CUDA device; without one it ends with status 69 and says so.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import traceback
from collections.abc import Callable, Iterator

from bench.gpu_timing import Budget, ceilings
from bench.result import Report, Row
from llmscale.errors import NoCudaDevice

Section = Callable[[Budget, dict[str, float]], Iterator[Row]]
MAX_SECTION_SECONDS = 480


def main(arguments: argparse.Namespace) -> Report:
    """Runs all sections, or those of `--sections`."""
    import torch

    from llmscale.cuda.device import cuda_device

    try:
        cuda_device(0)
    except NoCudaDevice as error:
        print(f"NoCudaDevice: {error}", file=sys.stderr)
        raise SystemExit(os.EX_UNAVAILABLE) from error
    if not 0 < arguments.section_seconds <= MAX_SECTION_SECONDS:
        raise SystemExit(f"--section-seconds is {arguments.section_seconds}, at most {MAX_SECTION_SECONDS}")
    chosen = sections()
    wanted = arguments.sections.split(",") if arguments.sections else list(chosen)
    if unknown := sorted(set(wanted) - set(chosen)):
        raise SystemExit(f"--sections has {', '.join(unknown)}; there are {', '.join(chosen)}")
    torch.manual_seed(arguments.seed)
    limits = ceilings()
    rows: list[Row] = []
    for name in wanted:
        rows += run_section(name, chosen[name], limits, 60 if arguments.quick else arguments.section_seconds)
        # Tensors in cycles hold memory that the next section, or its server, needs.
        gc.collect()
        torch.cuda.empty_cache()
    machine = f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}"
    return Report("gpu", arguments.seed, rows, limits, machine=machine)


def sections() -> dict[str, Section]:
    """In the order in which they run."""
    from bench import gpu_attention, gpu_copies, gpu_matmul, gpu_sampling, gpu_serving, gpu_steps

    return {
        "correctness": lambda budget, _: gpu_matmul.correctness(budget),
        "int4": gpu_matmul.int4_rates,
        "e4m3": gpu_matmul.e4m3_rates,
        "attention-correctness": lambda budget, _: gpu_attention.correctness(budget),
        "decode": gpu_attention.decode_rates,
        "chunk": gpu_attention.chunk_rates,
        "sampling": gpu_sampling.sampling_rates,
        "copies": gpu_copies.copy_rates,
        "calibration": lambda budget, _: gpu_copies.calibration(budget),
        "packing": gpu_copies.packing_rates,
        "steps": gpu_steps.step_rates,
        "serving": gpu_serving.serving_rates,
    }


def run_section(name: str, section: Section, limits: dict[str, float], seconds: float) -> list[Row]:
    """Its rows; one more if it failed, and one if time was too short for all cases."""
    rows: list[Row] = []
    budget = Budget(seconds)
    try:
        rows.extend(section(budget, limits))
    except Exception as error:  # noqa: BLE001 - a broken kernel must not cost the figures of the others
        traceback.print_exc()
        rows.append(
            Row(f"{name}/failed", 1, "failures", 1, 1, 1, None, {"error": f"{type(error).__name__}: {error}"[:300]})
        )
    if budget.left_out:
        rows.append(Row(f"{name}/left-out", budget.left_out, "cases", budget.left_out, budget.left_out, 1))
    return rows
