"""What does a conversation cost that comes back after its KV was evicted? Time to the first token of its next turn.

Four engines of the same model: one with a host tier (copy), one with a host tier of two conversations and a disk below
it (disk), one without either (recompute), one whose pool holds everything (neither). Each conversation's first turn is
computed, another conversation takes its blocks (on the engine with a disk five, so that it leaves the host too, and the
system is asked to drop the file from its memory), then the second turn, 16 tokens longer, is asked for one token.
Rounds go through the engines in turn, no prompt twice, so that a slower minute of the machine is one for all. Ids of
the second turns are compared.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

from bench.offline_cases import Prompts
from bench.result import Report, Row
from bench.shapes import SHAPES, model_folder
from bench.statistics import Spread, spread
from llmscale.config import NodeSettings
from llmscale.node.plan import plan_replica

PREFIXES = (512, 1_024, 2_000)
QUICK_PREFIXES = (512,)
NEW_TOKENS = 16
MAX_TOKENS = 2_304
BLOCK_TOKENS = 32
WAYS = ("copy", "disk", "recompute", "neither")
# Two conversations on the host, half of it for what is read; the fifth one pushes the first out.
DISK_FILLERS = 5


def main(arguments: argparse.Namespace) -> Report:
    """Runs on `--model`: S by default, a shape or a folder."""
    from llmscale.models.locate import locate_model

    name = arguments.model or "S"
    folder = model_folder(name) if name in SHAPES else locate_model(name)
    settings = NodeSettings(model=str(folder), listen="", max_sequence_tokens=MAX_TOKENS)
    block_bytes = plan_replica(settings).block_bytes
    with tempfile.TemporaryDirectory(prefix="llmscale-bench-") as disk:
        engines = {
            way: _Engine(str(folder), way, block_bytes, arguments.threads, Path(disk) if way == "disk" else None)
            for way in WAYS
        }
        rows = _measure(name, engines, arguments)
        engines["disk"].close()
    return Report("offload", arguments.seed, rows)


def _measure(name: str, engines: dict[str, _Engine], arguments: argparse.Namespace) -> list[Row]:
    prompts = Prompts(engines["copy"].vocabulary, arguments.seed)
    rows: list[Row] = []
    for prefix in QUICK_PREFIXES if arguments.quick else PREFIXES:
        seconds: dict[str, list[float]] = {way: [] for way in WAYS}
        # The first round touches memory for the first time and teaches the cost models; it is thrown away.
        for number in range(arguments.repeats + 1):
            first, *fillers = prompts.draw(1 + DISK_FILLERS, prefix)
            (more,) = prompts.draw(1, NEW_TOKENS)
            ids = []
            for way, engine in engines.items():
                took, token = engine.come_back(first, fillers, more)
                ids.append(token)
                if number > 0:
                    seconds[way].append(took)
            if len(set(ids)) > 1:
                raise AssertionError(f"the second turn begins with {ids}: copying has changed it")
        rows += _rows(f"{name}/{prefix}", seconds)
    return rows


def _rows(case: str, seconds: dict[str, list[float]]) -> list[Row]:
    rows = [Row.of(f"{case}/{way}", "ms", _scaled(values, 1e3)) for way, values in seconds.items()]
    for way in ("copy", "disk"):
        ratios = [slow / quick for slow, quick in zip(seconds["recompute"], seconds[way], strict=True)]
        rows.append(Row.of(f"{case}/recompute-over-{way}", "x", spread(ratios)))
    return rows


def _scaled(values: list[float], factor: float) -> Spread:
    return spread([value * factor for value in values])


class _Engine:
    """An `LLM` with room for one conversation in its pool, or for many."""

    def __init__(self, folder: str, way: str, block_bytes: int, threads: int | None, disk: Path | None) -> None:
        from llmscale import LLM

        conversation_blocks = MAX_TOKENS // BLOCK_TOKENS
        roomy = 64 * conversation_blocks * block_bytes
        self._llm = LLM(
            folder,
            max_model_len=MAX_TOKENS,
            max_num_seqs=4,
            kv_cache_bytes=roomy if way == "neither" else (conversation_blocks + 2) * block_bytes,
            kv_host_bytes={"copy": 16, "disk": 2}.get(way, 0) * conversation_blocks * block_bytes,
            kv_disk=disk,
            kv_disk_bytes=None if disk is None else 64 * conversation_blocks * (block_bytes + 8_192),
            threads=threads,
        )
        self._evicts = way != "neither"
        self._disk = disk
        self.vocabulary = self._llm.tokenizer.vocabulary

    def come_back(self, first: list[int], fillers: list[list[int]], more: list[int]) -> tuple[float, int]:
        """Seconds until the first token of the second turn, and that token."""
        self._token(first)
        for filler in fillers[: self._fillers()]:
            # Enough to take every block of the conversation before.
            longer = filler
            while len(longer) < MAX_TOKENS - BLOCK_TOKENS:
                longer = [*longer, *reversed(longer)][: MAX_TOKENS - BLOCK_TOKENS]
            self._token(longer)
        read = self._llm._replica.disk_blocks()[1]
        self._forget_file()
        start = time.perf_counter()
        token = self._token([*first, *more])
        took = time.perf_counter() - start
        if self._disk is not None:
            came = self._llm._replica.disk_blocks()[1] - read
            sys.stderr.write(f"{came} of {len(first) // BLOCK_TOKENS} blocks came from the disk\n")
        return took, token

    def _fillers(self) -> int:
        if self._disk is not None:
            return DISK_FILLERS
        return 1 if self._evicts else 0

    def _forget_file(self) -> None:
        """Has the system drop what it keeps of the file, so that the next read is one of the disk."""
        if self._disk is None:
            return
        with (self._disk / "rank-0.kv").open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        self._llm.close()

    def _token(self, prompt: list[int]) -> int:
        from llmscale import SamplingParams

        (output,) = self._llm.generate([prompt], SamplingParams(temperature=0, max_tokens=1, ignore_eos=True))
        return output.outputs[0].token_ids[0]
