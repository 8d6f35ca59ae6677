"""How fast is a model in this process? `LLM` on fixed cases, and its throughput against the number of sequences.

prefill512, prefill2048: one prompt, time to the first token. decode1: 64 tokens after the first at context 256, the
time of a one-token run taken off. batch8, batch32: that many prompts of 128 with 64 tokens each, output tokens over the
whole time. cN: N sequences at once, prompt 64, 32 tokens. Greedy, end-of-sequence ignored, no prompt twice. Other
runtimes run the same cases in processes of their own, one at a time.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from typing import Any

from bench import peers
from bench.limits import measure_limits
from bench.offline_cases import run_cases
from bench.result import Report, Row
from bench.shapes import SHAPES, Shape, model_folder
from bench.statistics import spread

CASES = ("prefill512", "prefill2048", "decode1", "batch8", "batch32")
CONCURRENCIES = (1, 2, 4, 8, 16, 32)
QUICK_CASES = ("prefill512", "decode1", "batch8")
QUICK_CONCURRENCIES = (1, 8, 32)


def limit_of(case: str, shape: Shape, limits: dict[str, float]) -> float | None:
    """The most tokens per second that the machine allows, by the one resource that bounds the case.

    Prefill: two operations per weight of the layers. Decoding one sequence: every weight is read once per token, in two
    bytes. Batches are bounded by both at once, so no single figure is honest there.
    """
    if case.startswith("prefill"):
        return limits["bf16_flops_per_second"] / (2 * shape.layer_parameters)
    if case in ("decode1", "c1"):
        return limits["read_bytes_per_second"] / (2 * (shape.layer_parameters + shape.head_parameters))
    return None


def main(arguments: argparse.Namespace) -> Report:
    """Runs on `--model`: a shape (tiny, S, M, L), an embedded model, or a folder."""
    from llmscale import LLM, SamplingParams
    from llmscale.models.locate import locate_model

    name = arguments.model or "tiny-chat"
    folder = model_folder(name) if name in SHAPES else locate_model(name)
    # The same for ours, the peers and the limits: a small model would take fewer by itself.
    threads = arguments.threads or len(os.sched_getaffinity(0))
    limits = measure_limits(threads)
    llm = LLM(folder, threads=threads)
    vocabulary = llm.tokenizer.vocabulary

    def generate(prompts: Sequence[list[int]], output_tokens: int) -> None:
        params = SamplingParams(temperature=0, max_tokens=output_tokens, ignore_eos=True)
        for output in llm.generate(prompts, params):
            made = len(output.outputs[0].token_ids)
            if made != output_tokens:
                raise AssertionError(f"{made} tokens came, {output_tokens} were asked for")

    cases = arguments.cases.split(",") if arguments.cases else _cases(llm.max_model_len, quick=arguments.quick)
    ours = run_cases(generate, vocabulary, cases, arguments.repeats, arguments.seed)
    task = peers.Task(folder, vocabulary, tuple(cases), arguments.repeats, arguments.seed, threads)
    others = peers.run_all(task)
    # The limits count weights of two bytes.
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    bounded = config.get("dtype", config.get("torch_dtype")) == "bfloat16" and "quantization_config" not in config
    shape = SHAPES.get(name) or _shape_of(config)
    rows = [
        Row.of(
            f"{name}/{case}",
            "tokens/s",
            spread(values),
            limit=limit_of(case, shape, limits) if bounded else None,
            peers={peer: _of_case(found, case) for peer, found in others.items()},
        )
        for case, values in ours.items()
    ]
    return Report("offline", arguments.seed, rows, limits)


def _of_case(found: dict[str, float | str] | str, case: str) -> float | str:
    return found if isinstance(found, str) else found.get(case, "failed")


def _cases(max_sequence_tokens: int, *, quick: bool) -> list[str]:
    fixed = QUICK_CASES if quick else CASES
    concurrencies = QUICK_CONCURRENCIES if quick else CONCURRENCIES
    # The longest prompt needs one token more than itself.
    fitting = [case for case in fixed if case != "prefill2048" or max_sequence_tokens > 2_048]
    for case in sorted(set(fixed) - set(fitting)):
        print(f"left out: {case} does not fit into {max_sequence_tokens} tokens", file=sys.stderr)
    return [*fitting, *(f"c{count}" for count in concurrencies)]


def _shape_of(config: dict[str, Any]) -> Shape:
    heads = config["num_attention_heads"]
    return Shape(
        config["num_hidden_layers"],
        config["hidden_size"],
        heads,
        config.get("num_key_value_heads", heads),
        config["intermediate_size"],
        config["vocab_size"],
        config.get("head_dim"),
    )
