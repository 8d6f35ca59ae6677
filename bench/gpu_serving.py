"""Serving on a device: `llmscale serve` with an 8B-shaped random model at 1 to 256 streams, vLLM beside it.

Both read one checkpoint and get the same ids over HTTP, one server after the other because each takes the device's
memory. A round of requests that is not measured comes first. vLLM is the one on the PATH; where there is none, or no
time is left for it, the rows say so.
"""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from bench.gpu_timing import Budget
from bench.load import Objectives, Outcome, closed_loop, summarize
from bench.offline_cases import Prompts
from bench.raw_http import RawClient
from bench.result import Row
from bench.server import free_port, running, serving
from bench.serving import model_of
from bench.shapes import SHAPES, model_folder
from bench.statistics import Spread, spread
from bench.workload import Arrival

SHAPE = "8B"
STREAMS = (1, 16, 64, 256)
PROMPT_TOKENS = 512
OUTPUT_TOKENS = 128
MAX_MODEL_TOKENS = 2_048
ROUNDS = 3
MAX_START_SECONDS = 300.0
"""Of either: 16 GB are read, kernels compiled, graphs captured."""


def serving_rates(budget: Budget, limits: dict[str, float]) -> Iterator[Row]:
    """Output tokens per second of both."""
    folder = str(model_folder(SHAPE))
    own = _measured(budget, _own(folder))
    vllm = shutil.which("vllm")
    why = "not on the PATH" if vllm is None else "no time was left"
    peers: dict[int, Spread] = {}
    if vllm is not None and own and budget.allows():
        try:
            peers = _measured(budget, _vllm(vllm, folder))
        except (RuntimeError, OSError) as error:
            # A peer that does not start must not cost our own figures.
            why = str(error)
    for streams, tokens_per_second in own.items():
        peer: float | str = peers[streams].median if streams in peers else why
        yield Row.of(f"serving/{SHAPE}/{streams}-streams", "tokens/s", tokens_per_second, peers={"vllm": peer})


def _measured(budget: Budget, server: AbstractContextManager[int]) -> dict[int, Spread]:
    found: dict[int, Spread] = {}
    prompts = Prompts(SHAPES[SHAPE].vocabulary, seed=0)
    with server as port:
        asyncio.run(_tokens_per_second(port, 1, prompts))
        for streams in STREAMS:
            if budget.allows():
                rounds = [asyncio.run(_tokens_per_second(port, streams, prompts)) for _ in range(ROUNDS)]
                found[streams] = spread(rounds)
    return found


async def _tokens_per_second(port: int, streams: int, prompts: Prompts) -> float:
    """Of two requests per stream. Raises RuntimeError for one that failed."""
    name, _ = model_of(f"http://127.0.0.1:{port}")
    client = RawClient("127.0.0.1", port, name, stream=True)
    drawn = iter(prompts.draw(2 * streams, PROMPT_TOKENS))

    async def send(arrival: Arrival, outcome: Outcome) -> None:
        await client.send(next(drawn), arrival, outcome)

    arrivals = [Arrival(0, PROMPT_TOKENS, OUTPUT_TOKENS) for _ in range(2 * streams)]
    outcomes = await closed_loop(arrivals, send, time.perf_counter, streams)
    await client.close()
    if errors := sorted({outcome.error for outcome in outcomes if outcome.error}):
        raise RuntimeError(f"{len(errors)} kinds of errors, the first: {errors[0]}")
    return summarize(outcomes, Objectives(1.0, 1.0))["tokens_per_second"]


@contextmanager
def _own(folder: str) -> Iterator[int]:
    options = ("--max-model-len", str(MAX_MODEL_TOKENS))
    with serving(folder, *options, max_start_seconds=MAX_START_SECONDS) as (port, _, _):
        yield port


@contextmanager
def _vllm(program: str, folder: str) -> Iterator[int]:
    port = free_port()
    command = [program, "serve", folder, "--port", str(port), "--max-model-len", str(MAX_MODEL_TOKENS)]
    command.append("--no-enable-prefix-caching")
    with running(command, f"http://127.0.0.1:{port}/health", MAX_START_SECONDS):
        yield port
