"""`llmscale eval`: what a model is worth on items, and what it lost beside the one it was made from."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as ProgressBars
from rich.table import Table

from llmscale import env
from llmscale.errors import ConfigError
from llmscale.extras import NODE_PACKAGES, lacking


@dataclass(frozen=True, slots=True)
class EvalOptions:
    """What the command was told."""

    model: str
    tasks: str
    against: str | None
    dtype: str
    quantization: str | None
    limit: int | None
    seed: int
    threads: int | None
    executor: str
    kv_dtype: str
    as_json: bool


def run(options: EvalOptions) -> None:
    """Prints a table, or one JSON object. Raises ModelError and ConfigError."""
    if (lack := lacking(NODE_PACKAGES, "node")) is not None:
        raise ConfigError(f"llmscale eval needs more than the base install: {lack}")
    env.prepare_for_torch()
    from llmscale.evaluation.evaluation import evaluate
    from llmscale.evaluation.executors import ModelChoice
    from llmscale.evaluation.items import evaluation_items
    from llmscale.models.locate import locate_model
    from llmscale.models.registry import describe_model
    from llmscale.tokenizer import Tokenizer

    folder = locate_model(options.model)
    spec = describe_model(folder, options.quantization).spec
    tokenizer = Tokenizer(folder, vocabulary=spec.vocabulary)
    items = evaluation_items(options.tasks, tokenizer, options.limit, options.seed, spec.max_sequence_tokens)
    model = ModelChoice(
        folder, options.dtype, options.quantization, options.threads, options.executor, options.kv_dtype
    )
    reference = None
    if options.against is not None:
        reference = ModelChoice(locate_model(options.against), options.dtype, None, options.threads, options.executor)
    # On standard error, so that a JSON object stands alone on the output.
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with ProgressBars(*columns, console=Console(stderr=True), transient=True) as bars:
        known: dict[str, Any] = {}

        def told(what: str, done: int, total: int) -> None:
            if what not in known:
                known[what] = bars.add_task(what, total=total)
            bars.update(known[what], completed=done)

        evaluation = evaluate(model, items, reference, told)
    result = _as_data(options, len(items), evaluation)
    if options.as_json:
        print(json.dumps(result, indent=2))
    else:
        _show(result, options)


def _as_data(options: EvalOptions, items: int, evaluation: Any) -> dict[str, Any]:
    """The result as the JSON object that scripts read."""
    data: dict[str, Any] = {
        "tasks": options.tasks,
        "items": items,
        "seed": options.seed,
        "executor": options.executor,
        "scored_tokens": evaluation.model.scored_tokens,
        "model": {
            "name": options.model,
            "quantization": options.quantization,
            "kv_dtype": options.kv_dtype,
            **_scores(evaluation.model),
        },
    }
    if evaluation.reference is not None:
        data["reference"] = {"name": options.against, **_scores(evaluation.reference)}
        data["divergence"] = {
            "mean_kl_nats": evaluation.divergence.mean_nats,
            "same_best_share": evaluation.divergence.same_best_share,
        }
    if (pairs := evaluation.pairs) is not None:
        low, high = pairs.interval_points(options.seed)
        data["pairs"] = {
            "both_right": pairs.both,
            "only_model_right": pairs.only_model,
            "only_reference_right": pairs.only_reference,
            "neither_right": pairs.neither,
            "difference_points": pairs.difference_points,
            "interval_95_points": [low, high],
            "mcnemar_p": pairs.mcnemar_p(),
        }
    return data


def _scores(scores: Any) -> dict[str, Any]:
    asked = len(scores.graded)
    found: dict[str, Any] = {"weight_bytes": scores.weight_bytes, "perplexity": scores.perplexity}
    if asked:
        found["exact_match_percent"] = 100 * sum(scores.graded) / asked
        found["right"], found["asked"] = sum(scores.graded), asked
        found["by_task"] = {task.task: {"right": task.right, "asked": task.asked} for task in scores.tasks}
    return found


def _show(result: dict[str, Any], options: EvalOptions) -> None:
    console = Console()
    table = Table(box=None, header_style="bold")
    table.add_column(f"{result['items']:,} items of {options.tasks}, seed {options.seed}")
    sides = [side for side in ("model", "reference") if side in result]
    for side in sides:
        table.add_column(result[side]["name"] if side == "reference" else options.model, justify="right")

    def row(name: str, *values: str) -> None:
        table.add_row(name, *values)

    row("weights, MB", *(f"{result[side]['weight_bytes'] / 1e6:,.2f}" for side in sides))
    row(
        f"perplexity of {result['scored_tokens']:,} answer tokens",
        *(f"{result[side]['perplexity']:.4f}" for side in sides),
    )
    if "right" in result["model"]:
        row("exact match, %", *(f"{result[side]['exact_match_percent']:.2f}" for side in sides))
        for task, counts in result["model"]["by_task"].items():
            shown = [
                f"{100 * result[side]['by_task'][task]['right'] / counts['asked']:.1f} of {counts['asked']:,}"
                for side in sides
            ]
            row(f"  {task}", *shown)
    console.print(table)
    if "divergence" in result:
        found = result["divergence"]
        console.print(
            f"Kullback-Leibler divergence from {options.against}: {found['mean_kl_nats']:.5f} nats per token;"
            f" the same most likely token at {100 * found['same_best_share']:.2f} % of them"
        )
    if "pairs" in result:
        pairs = result["pairs"]
        low, high = pairs["interval_95_points"]
        console.print(
            f"right: both {pairs['both_right']:,}, only {options.model} {pairs['only_model_right']:,}, only"
            f" {options.against} {pairs['only_reference_right']:,}, neither {pairs['neither_right']:,};"
            f" difference {pairs['difference_points']:+.2f} points (95 %: {low:+.2f} to {high:+.2f}),"
            f" McNemar's p = {pairs['mcnemar_p']:.3g}"
        )
