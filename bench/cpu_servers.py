"""Servers of `bench cpu`: ours and the peers', each started with what it needs for 64 streams and long prompts.

The loads: 64 streams of short requests; 32 running streams with and without a prompt of 1,500 tokens every second; a
tiny model, where everything but the model is measured; a start to its first token. Prompts are ids, none twice.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.cpu_cases import NO_SERVER, OURS, Lineup, Measured, Variant, machine_for_us, tell
from bench.server import free_port, resident_bytes, running
from bench.serving import model_of
from bench.shapes import SHAPES
from bench.statistics import Spread, spread
from bench.streams import Load, LoadFailed, load, program

MAX_START_SECONDS = 400.0
MIXED_SECONDS = 8
VLLM_ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "2",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "PYTHONPATH": "",
}


@dataclass(frozen=True, slots=True)
class Server:
    """One that answers."""

    port: int
    model: str
    vocabulary: int
    group: int
    ready_seconds: float

    def load(self, seed: int, **options: int) -> Load:
        """One run of the generator."""
        return load(self.port, self.model, self.vocabulary, seed, **options)


Values = dict[str, list[float]]
Measure = Callable[[Server, int, int], Values]
"""Of a server, with so many repetitions and a first seed: values by case."""


def served(server: Server, repeats: int, seed: int) -> Values:
    """64 streams of 32 tokens after 32."""
    options = {"streams": 64, "prompt": 32, "output": 32}
    server.load(seed, **options, requests=64)
    runs = [server.load(seed + number, **options, requests=192) for number in range(1, repeats + 1)]
    return {
        "served64": [run.tokens_per_second for run in runs],
        "served64/gap-p99": [run.gap_ms(99) for run in runs],
        "served64/first-token": [run.first_token_ms(50) for run in runs],
    }


def mixed(server: Server, repeats: int, seed: int) -> Values:
    """32 running streams of 128 tokens after 64, and a prompt of 1,500 tokens every second."""
    options = {"streams": 32, "prompt": 64, "output": 128, "seconds": MIXED_SECONDS}
    # A seed for each run, and none of another measure's: a prompt that came before would be in a prefix cache, and one
    # of 64 ids began with one of the 32 that `served` had sent under the same seed.
    seed += 1 << 20
    alone = [server.load(seed + number, **options) for number in range(repeats)]
    unloaded = spread([run.tokens_per_second for run in alone]).median
    seeds = range(seed + repeats, seed + 2 * repeats)
    runs = [server.load(number, **options, long=1_500, long_output=16) for number in seeds]
    return {
        "mixed/unloaded": [run.tokens_per_second for run in alone],
        "mixed/unloaded/gap-p99": [run.gap_ms(99) for run in alone],
        "mixed/loaded": [run.tokens_per_second for run in runs],
        "mixed/share": [run.tokens_per_second / unloaded for run in runs],
        "mixed/gap-p99": [run.gap_ms(99) for run in runs],
        "mixed/long-first-token": [run.first_token_ms(50, of_long=True) for run in runs],
        "mixed/long-first-token-slowest": [run.first_token_ms(100, of_long=True) for run in runs],
    }


def tiny(server: Server, repeats: int, seed: int) -> Values:
    """A request of one token on 64 streams and on one; 64 tokens on 64 streams."""
    seeds = range(seed + 1, seed + repeats + 1)
    server.load(seed, streams=64, prompt=8, output=64, requests=64)
    plain = {"prompt": 8, "output": 1, "stream": 0}
    return {
        "served/requests": [server.load(s, **plain, streams=64, requests=2_048).requests_per_second for s in seeds],
        "served/streamed": [
            server.load(s << 8, streams=64, prompt=8, output=64, requests=256).tokens_per_second for s in seeds
        ],
        "served/round-trip": [server.load(s << 16, **plain, streams=1, requests=200).round_trip_ms() for s in seeds],
    }


def measure_servers(
    lineup: Lineup, model: str, measures: Sequence[Measure], repeats: int, seed: int, threads: int, found: Measured
) -> None:
    """Every variant's server once, with all measures on it; into `found`."""
    for variant in lineup.variants:
        reason = lineup.missing(variant, model)
        if variant.runtime == "openvino":
            reason = NO_SERVER
        for measure in measures:
            for case in CASES[measure]:
                found[variant, model, case] = reason or "failed"
        if reason is not None:
            continue
        try:
            with _started(lineup, variant, model, threads, "served") as server:
                for measure in measures:
                    _keep(found, variant, model, measure(server, repeats, seed))
        except (LoadFailed, RuntimeError) as error:
            print(f"{model} {variant.name}: {error}", file=sys.stderr, flush=True)


def measure_starts(lineup: Lineup, model: str, repeats: int, seed: int, threads: int, found: Measured) -> None:
    """From the command to the first token of a first request, with the model in the page cache; into `found`.

    vLLM takes minutes, so it starts once.
    """
    for variant in lineup.variants:
        reason = lineup.missing(variant, model)
        if variant.runtime == "openvino":
            reason = NO_SERVER
        values: Values = {case: [] for case in START_CASES}
        for number in range(0 if reason else 1 if variant.runtime == "vllm" else repeats):
            try:
                with _started(lineup, variant, model, threads, "start") as server:
                    first = server.load(seed + number, streams=1, prompt=8, output=1, requests=1)
                    values["start/first-token"].append(server.ready_seconds + first.first_token_ms(100) / 1e3)
                    values["start/resident"].append(resident_bytes(server.group) / (1 << 20))
            except (LoadFailed, RuntimeError) as error:
                print(f"{model} {variant.name}: {error}", file=sys.stderr, flush=True)
        for case in START_CASES:
            found[variant, model, case] = reason or "failed"
        _keep(found, variant, model, {case: kept for case, kept in values.items() if kept})


START_CASES = ("start/first-token", "start/resident")
CASES: dict[Measure, tuple[str, ...]] = {
    served: ("served64", "served64/gap-p99", "served64/first-token"),
    mixed: (
        "mixed/unloaded",
        "mixed/unloaded/gap-p99",
        "mixed/loaded",
        "mixed/share",
        "mixed/gap-p99",
        "mixed/long-first-token",
        "mixed/long-first-token-slowest",
    ),
    tiny: ("served/requests", "served/streamed", "served/round-trip"),
}
"""By measure, so that a server that fails leaves a reason in every case."""


def _keep(found: Measured, variant: Variant, model: str, values: Values) -> None:
    for case, kept in values.items():
        measured: Spread = spread(kept)
        found[variant, model, case] = measured
        tell(f"{model}/{case}", variant, measured)


@contextlib.contextmanager
def _started(lineup: Lineup, variant: Variant, model: str, threads: int, section: str) -> Iterator[Server]:
    """A server that is ready, alone on the machine, ended afterwards."""
    # Built before anything is timed.
    program()
    port = free_port()
    command, environment = server_command(lineup, variant, model, port, threads)
    health = "health/ready" if variant.runtime == OURS else "health"
    url = f"http://127.0.0.1:{port}"
    with (
        machine_for_us(lineup.others, f"{model}/{section} {variant.name}") as watch,
        running(command, f"{url}/{health}", MAX_START_SECONDS, environment) as (group, seconds),
    ):
        try:
            yield Server(port, model_of(url)[0], SHAPES[model].vocabulary, group, seconds)
        finally:
            watch.stop(group)


def server_command(
    lineup: Lineup, variant: Variant, model: str, port: int, threads: int
) -> tuple[list[str], dict[str, str]]:
    """The command line, and what is added to the environment."""
    weights = lineup.model(variant, model)
    if variant.runtime == OURS:
        command = [sys.executable, "-m", "llmscale.cli", "serve", str(weights), "--port", str(port)]
        command += ["--threads", str(threads), "--dtype", "bfloat16"]
        return command + ([] if variant.scheme == "bf16" else ["--quantization", variant.scheme]), {}
    program_path = lineup.program(variant.runtime)
    assert program_path is not None, "a peer that is not installed has been left out"
    if variant.runtime == "llama.cpp":
        command = [str(program_path / "llama-server"), "-m", f"{weights}.gguf", "--port", str(port)]
        command += ["-t", str(threads), "-tb", str(threads), "-fa", "on"]
        return [*command, "--parallel", "64", "-c", "32768", "--kv-unified"], {}
    command = [str(program_path), "-m", "vllm.entrypoints.openai.api_server", "--model", str(weights)]
    command += ["--port", str(port), "--dtype", "bfloat16", "--max-model-len", "4096", "--max-num-seqs", "64"]
    command += ["--no-enable-prefix-caching", "--disable-log-stats", "--disable-uvicorn-access-log"]
    return command, VLLM_ENVIRONMENT | {"VLLM_CPU_OMP_THREADS_BIND": f"0-{threads - 1}", "PATH": _path(program_path)}


def _path(python: Path) -> str:
    """Compilers and tools of the peer's environment first."""
    return f"{python.parent}{os.pathsep}{os.environ['PATH']}"
