"""How does a server do under load? Times to first token, per token, goodput; and how much it can take at all.

Closed loop (always): requests per second of one token on 64 streams, streamed tokens per second of 64 tokens on 64
streams, one stream alone. Open loop: a trace (`--trace`) or Poisson arrivals (`--rate`), every time counted from when a
request was due. Without `--url` it starts `llmscale serve MODEL` itself. The generator shares the server's machine.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
import urllib.request
from contextlib import ExitStack
from pathlib import Path
from urllib.parse import urlsplit

from bench.load import Objectives, Outcome, closed_loop, open_loop, summarize
from bench.offline_cases import Prompts
from bench.raw_http import RawClient
from bench.result import Report, Row
from bench.server import serving
from bench.shapes import SHAPES, model_folder
from bench.statistics import spread
from bench.workload import Arrival, fit, load_trace, poisson

_UNITS = {
    "requests": "requests",
    "errors": "requests",
    "requests_per_second": "requests/s",
    "tokens_per_second": "tokens/s",
    "goodput_share": "share",
}


def main(arguments: argparse.Namespace) -> Report:
    """Runs all modes that the arguments name."""
    with ExitStack() as stack:
        url = arguments.url
        if url is None:
            model = arguments.model or "tiny-chat"
            model = str(model_folder(model)) if model in SHAPES else model
            port, _, _ = stack.enter_context(serving(model, threads=arguments.threads))
            url = f"http://127.0.0.1:{port}"
        return asyncio.run(_measure(url, arguments))


async def _measure(url: str, arguments: argparse.Namespace) -> Report:
    parts = urlsplit(url)
    host, port = parts.hostname or "127.0.0.1", parts.port or 80
    model, max_sequence_tokens = model_of(url)
    prompts = Prompts(arguments.vocabulary, arguments.seed)
    rows: list[Row] = []

    async def run(arrivals: list[Arrival], *, stream: bool, streams: int | None) -> dict[str, float]:
        client = RawClient(host, port, model, stream=stream)
        drawn = {id(arrival): prompts.draw(1, arrival.prompt_tokens)[0] for arrival in arrivals}

        async def send(arrival: Arrival, outcome: Outcome) -> None:
            await client.send(drawn[id(arrival)], arrival, outcome)

        if streams is None:
            outcomes = await open_loop(arrivals, send, time.perf_counter, asyncio.sleep)
        else:
            outcomes = await closed_loop(arrivals, send, time.perf_counter, streams)
        await client.close()
        for error in sorted({outcome.error for outcome in outcomes if outcome.error})[:3]:
            print(f"error: {error}", file=sys.stderr)
        return summarize(outcomes, Objectives(arguments.first_token_ms / 1e3, arguments.token_ms / 1e3))

    def add(case: str, runs: list[dict[str, float]]) -> None:
        names = sorted(set.intersection(*(set(run) for run in runs)), key=list(runs[0]).index)
        for name in names:
            unit = _UNITS.get(name, "ms")
            rows.append(Row.of(f"{case}/{name}", unit, spread([run[name] for run in runs])))

    scale = 4 if arguments.quick else 1
    await run([Arrival(0, 8, 8) for _ in range(8)], stream=True, streams=4)
    for case, count, output_tokens, streams in (
        ("closed-1-token", 512 // scale, 1, 64),
        ("closed-64-tokens", 128 // scale, 64, 64),
        ("one-stream", 8 // scale, 64, 1),
    ):
        # Fewer requests than streams would measure fewer streams than the case names.
        same = [Arrival(0, 8, output_tokens) for _ in range(max(count, streams))]
        repeated = [
            await run(list(map(_copy, same)), stream=output_tokens > 1, streams=streams)
            for _ in range(arguments.repeats)
        ]
        add(case, repeated)
    for case, arrivals in _open_workloads(arguments):
        fitted, cut = fit(arrivals, max_sequence_tokens)
        if cut:
            print(f"{case}: {cut} of {len(fitted)} requests were cut to {max_sequence_tokens} tokens", file=sys.stderr)
        add(case, [await run(list(map(_copy, fitted)), stream=True, streams=None) for _ in range(arguments.repeats)])
    return Report("serving", arguments.seed, rows)


def _copy(arrival: Arrival) -> Arrival:
    """A record of its own, because prompts are drawn per record."""
    return Arrival(arrival.at_seconds, arrival.prompt_tokens, arrival.output_tokens)


def _open_workloads(arguments: argparse.Namespace) -> list[tuple[str, list[Arrival]]]:
    found = []
    if arguments.trace is not None:
        path = Path(arguments.trace)
        arrivals = load_trace(path, max_requests=arguments.max_requests, speed=arguments.speed)
        found.append((f"open-{path.name.partition('.')[0]}-x{arguments.speed:g}", arrivals))
    if arguments.rate is not None:
        seconds = arguments.seconds / (4 if arguments.quick else 1)
        drawn = poisson(arguments.rate, seconds, arguments.prompt_tokens, arguments.output_tokens, arguments.seed)
        found.append((f"open-poisson-{arguments.rate:g}", drawn))
    return found


def model_of(url: str) -> tuple[str, int]:
    """The served model's name and its longest sequence."""
    with urllib.request.urlopen(f"{url}/v1/models", timeout=30) as response:
        model = json.load(response)["data"][0]
    return model["id"], model.get("max_model_len") or 2_048
