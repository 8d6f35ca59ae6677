"""What do two cores give as one worker, two tensor-parallel ranks, or two pipeline stages, also as two hosts?

Every layout is a server of its own, measured end to end with the same clients: streams of 64 tokens side by side. The
time of a step, and the part of it that the last stage waited for the one before it, come from the server's counters.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families

from bench.fleet import hosts
from bench.load import Objectives, Outcome, closed_loop, summarize
from bench.offline_cases import Prompts
from bench.raw_http import RawClient
from bench.result import Report, Row
from bench.server import serving
from bench.serving import model_of
from bench.shapes import SHAPES, model_folder
from bench.statistics import spread
from bench.workload import Arrival
from llmscale.errors import ConfigError
from llmscale.models.locate import locate_model
from llmscale.models.registry import describe_model
from llmscale.models.shard import RankPlace, shard_model


@dataclass(frozen=True, slots=True)
class Layout:
    """How a model is cut; over two hosts its ranks meet over the network, here loopback, and on one host in memory."""

    name: str
    threads: int = 1
    tensor_size: int = 1
    stages: int = 1
    hosts: int = 1


LAYOUTS = (
    Layout("one-thread"),
    Layout("two-threads", threads=2),
    Layout("tp2", tensor_size=2),
    Layout("tp2-hosts", tensor_size=2, hosts=2),
    Layout("pp2", stages=2),
    Layout("pp2-hosts", stages=2, hosts=2),
)
STREAMS = (1, 8, 32)
PROMPT_TOKENS = 8
OUTPUT_TOKENS = 64
# Of every layout: the native executor, which one rank would get by itself, runs no more than one.
EXECUTOR = ("--executor", "torch")


@dataclass(frozen=True, slots=True)
class Counters:
    """What a server has counted since its start."""

    step_seconds: float
    bubble_seconds: float
    steps: float


def main(arguments: argparse.Namespace) -> Report:
    """`one-thread` is half the machine: perfect stages need half its time for a step of as many rows."""
    model = arguments.model or "tiny-chat"
    model = str(model_folder(model)) if model in SHAPES else model
    rows: list[Row] = []
    spec = describe_model(locate_model(model)).spec
    for layout in LAYOUTS:
        try:
            shard_model(spec, RankPlace(0, layout.tensor_size, 0, layout.stages))
        except ConfigError as error:
            print(f"{layout.name}: {error}", file=sys.stderr)
            continue
        with _running(layout, model) as port:
            rows += asyncio.run(_measure(layout, port, arguments))
    return Report("layouts", arguments.seed, rows)


@contextmanager
def _running(layout: Layout, model: str) -> Iterator[int]:
    """The port of a server of this layout."""
    ranks = ("-tp", str(layout.tensor_size), "-pp", str(layout.stages))
    if layout.hosts == 1:
        with serving(model, *ranks, *EXECUTOR, threads=layout.threads) as (port, _, _):
            yield port
    else:
        with hosts(model, layout.hosts, *ranks, *EXECUTOR, "--threads", str(layout.threads)) as running:
            yield running.port


async def _measure(layout: Layout, port: int, arguments: argparse.Namespace) -> list[Row]:
    url = f"http://127.0.0.1:{port}"
    model, _ = model_of(url)
    prompts = Prompts(arguments.vocabulary, arguments.seed)
    rows: list[Row] = []
    for streams in STREAMS[:2] if arguments.quick else STREAMS:
        tokens, steps, bubbles = [], [], []
        for repeat in range(arguments.repeats + 1):
            client = RawClient("127.0.0.1", port, model, stream=True)
            arrivals = [Arrival(0, PROMPT_TOKENS, OUTPUT_TOKENS) for _ in range(3 * streams)]
            drawn = {id(arrival): prompts.draw(1, PROMPT_TOKENS)[0] for arrival in arrivals}

            async def send(
                arrival: Arrival,
                outcome: Outcome,
                client: RawClient = client,
                drawn: dict[int, list[int]] = drawn,
            ) -> None:
                await client.send(drawn[id(arrival)], arrival, outcome)

            before = counters(url)
            outcomes = await closed_loop(arrivals, send, time.perf_counter, streams)
            # The status that carries the counters comes a few times per second; one more is awaited.
            after = await _settled(url)
            await client.close()
            if repeat == 0:
                continue
            tokens.append(summarize(outcomes, Objectives(1.0, 0.05))["tokens_per_second"])
            elapsed = after.step_seconds - before.step_seconds
            steps.append(elapsed / max(1.0, after.steps - before.steps) * 1e3)
            bubbles.append((after.bubble_seconds - before.bubble_seconds) / elapsed if elapsed else 0.0)
        rows.append(Row.of(f"{layout.name}/{streams}/tokens", "tokens/s", spread(tokens)))
        rows.append(Row.of(f"{layout.name}/{streams}/step", "ms", spread(steps)))
        if layout.stages > 1:
            rows.append(Row.of(f"{layout.name}/{streams}/bubble", "share", spread(bubbles)))
    return rows


def counters(url: str) -> Counters:
    """Sums over the server's replicas."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=30) as response:
        text = response.read().decode()
    totals: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            totals[sample.name] = totals.get(sample.name, 0.0) + sample.value
    return Counters(
        totals["llmscale:step_seconds_total"],
        totals["llmscale:pipeline_bubble_seconds_total"],
        totals["llmscale:steps_total"],
    )


async def _settled(url: str) -> Counters:
    """The counters once two reads in a row, further apart than two reports of a node, agree."""
    last = counters(url)
    while True:
        await asyncio.sleep(1.0)
        now = counters(url)
        if now == last:
            return now
        last = now
