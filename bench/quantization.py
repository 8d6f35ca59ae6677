"""What does each quantization cost in quality, and what does it save in bytes and time?

Exact match of greedy answers on unseen items of `llmscale.embedded.tasks` (embedded models only), as many disjoint sets
of items as repeats, and the share of answers that are those of the same model in bfloat16. Bytes are of the weights as
they are loaded. Speed: the offline cases prefill512, decode1 and batch8. FP8 is a copy that `llmscale quantize` has
written; on CPUs it becomes bfloat16 in memory. `--cases` chooses variants; bfloat16 is always measured, first.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.offline_cases import run_cases
from bench.result import Report, Row
from bench.shapes import SHAPES, model_folder
from bench.statistics import spread

if TYPE_CHECKING:
    from llmscale import LLM

ITEMS = 600
QUICK_ITEMS = 200
SPEED_CASES = ("prefill512", "decode1", "batch8")
MAX_ANSWER_TOKENS = 96


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to hold the weights: asked for while loading, or written by `llmscale quantize` first."""

    name: str
    dtype: str = "bfloat16"
    quantization: str | None = None
    written: tuple[str, int | None, bool] | None = None
    """method, group size, symmetric"""


VARIANTS = (
    Variant("bfloat16"),
    Variant("float32", dtype="float32"),
    Variant("int8", quantization="int8"),
    Variant("fp8", written=("fp8", None, False)),
    Variant("int4-32", quantization="int4"),
    Variant("int4-32-symmetric", written=("int4", 32, True)),
    Variant("int4-64", quantization="int4-64"),
    Variant("int4-128", quantization="int4-128"),
)


def main(arguments: argparse.Namespace) -> Report:
    """Runs on `--model`: an embedded model, a shape (speed only), or a folder (speed only)."""
    from llmscale.embedded import EMBEDDED_MODELS
    from llmscale.models.locate import locate_model

    name = arguments.model or "tiny-chat"
    folder = model_folder(name) if name in SHAPES else locate_model(name)
    sets = list(_item_sets(arguments)) if name in EMBEDDED_MODELS else []
    rows: list[Row] = []
    dense: list[list[str]] = []
    with tempfile.TemporaryDirectory(prefix="llmscale-bench-") as room:
        for variant in _chosen(arguments.cases):
            found = _measure(variant, folder, Path(room), sets, dense, arguments, name)
            # Told at once: a run takes minutes, and one that is cut off has still said something.
            for row in found:
                print(f"{row.case} {row.value:.5g} {row.unit} ({row.low:.5g}-{row.high:.5g})", file=sys.stderr)
            rows += found
    return Report("quantization", arguments.seed, rows)


def _chosen(cases: str | None) -> list[Variant]:
    if cases is None:
        return list(VARIANTS)
    names = cases.split(",")
    unknown = sorted(set(names) - {variant.name for variant in VARIANTS})
    if unknown:
        known = ", ".join(variant.name for variant in VARIANTS)
        raise SystemExit(f"--cases has {', '.join(unknown)}; there are {known}")
    return [variant for variant in VARIANTS if variant is VARIANTS[0] or variant.name in names]


def _measure(
    variant: Variant,
    folder: Path,
    room: Path,
    sets: Sequence[Sequence[Any]],
    dense: list[list[str]],
    arguments: argparse.Namespace,
    name: str,
) -> list[Row]:
    from llmscale import LLM
    from llmscale.errors import ConfigError

    case = f"{name}/{variant.name}"
    print(f"{case} ...", file=sys.stderr, flush=True)
    try:
        source = _source(variant, folder, room)
        llm = LLM(source, dtype=variant.dtype, quantization=variant.quantization, threads=arguments.threads)
    except ConfigError as error:
        # Groups of 128 do not divide every width.
        print(f"left out: {case}: {error}", file=sys.stderr)
        return []
    # What computes them keeps them in its own form: the head in bytes, for one.
    size = llm.weight_bytes
    rows = [Row(f"{case}/weights", size / 1e6, "MB", size / 1e6, size / 1e6, 1)]
    if sets:
        answers = [_answers(llm, items) for items in sets]
        if not dense:
            dense.extend(answers)
        right = [
            _percent(a == i.answer for a, i in zip(*pair, strict=True)) for pair in zip(answers, sets, strict=True)
        ]
        same = [_percent(a == b for a, b in zip(*pair, strict=True)) for pair in zip(answers, dense, strict=True)]
        rows.append(Row.of(f"{case}/exact_match", "% right", spread(right)))
        rows.append(Row.of(f"{case}/same_answers", "% as in bfloat16", spread(same)))
    speeds = run_cases(_generate(llm), llm.tokenizer.vocabulary, SPEED_CASES, arguments.repeats, arguments.seed)
    rows += [Row.of(f"{case}/{part}", "tokens/s", spread(values)) for part, values in speeds.items()]
    return rows


def _source(variant: Variant, folder: Path, room: Path) -> Path:
    from llmscale.models.quantizer import layout_for, quantize_folder

    if variant.written is None:
        return folder
    method, group_size, symmetric = variant.written
    target = room / variant.name
    quantize_folder(folder, target, layout_for(method, group_size, symmetric=symmetric))
    return target


def _item_sets(arguments: argparse.Namespace) -> Iterator[list[Any]]:
    from llmscale.embedded.tasks.splits import unseen_items

    count = QUICK_ITEMS if arguments.quick else ITEMS
    for repeat in range(arguments.repeats):
        yield unseen_items(count, 20_000 + arguments.seed + repeat)


def _answers(llm: LLM, items: Sequence[Any]) -> list[str]:
    from llmscale import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=MAX_ANSWER_TOKENS)
    outputs = llm.chat([list(item.messages) for item in items], params)
    return [output.outputs[0].text for output in outputs]


def _percent(flags: Iterator[bool]) -> float:
    found = list(flags)
    return 100 * sum(found) / len(found)


def _generate(llm: LLM) -> Any:
    from llmscale import SamplingParams

    def generate(prompts: Sequence[list[int]], output_tokens: int) -> None:
        llm.generate(list(prompts), SamplingParams(temperature=0, max_tokens=output_tokens, ignore_eos=True))

    return generate
