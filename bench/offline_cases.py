"""The cases of the offline benchmark, for any runtime that can complete prompts of token ids.

Standard library only: peers run this file in environments of their own. A rate is tokens over wall time of one call;
the first call of every case is thrown away. Knows nothing of models or of runtimes.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence

Generate = Callable[[Sequence[list[int]], int], None]
"""Completes prompts of ids, greedily, with exactly so many tokens each."""

_FIRST_ID = 300


class Prompts:
    """Prompts that no prefix cache has seen: ids of one generator, never the same prompt twice."""

    def __init__(self, vocabulary: int, seed: int) -> None:
        self._random = random.Random(seed)
        self._vocabulary = vocabulary

    def draw(self, count: int, length_tokens: int) -> list[list[int]]:
        """So many prompts of this length."""
        low = min(_FIRST_ID, self._vocabulary // 2)
        return [
            [self._random.randrange(low, self._vocabulary - 10) for _ in range(length_tokens)] for _ in range(count)
        ]


def run_cases(
    generate: Generate,
    vocabulary: int,
    cases: Sequence[str],
    repeats: int,
    seed: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Tokens per second of each case, one value per repetition. Used by our runtime and by every peer."""
    prompts = Prompts(vocabulary, seed)

    def seconds(count: int, prompt_tokens: int, output_tokens: int) -> float:
        batch = prompts.draw(count, prompt_tokens)
        start = clock()
        generate(batch, output_tokens)
        return clock() - start

    seconds(1, 64, 8)
    found: dict[str, list[float]] = {}
    for case in cases:
        rate = _rate_of(case, seconds)
        rate()
        found[case] = [rate() for _ in range(repeats)]
    return found


def _decoding(seconds: Callable[[int, int, int], float]) -> float:
    """Seconds of 64 tokens without their prompt: the same run with one token is taken off. Where the machine paused
    in the short run, nothing may be left, and a rate of 64 billion tokens/s was reported."""
    for _ in range(5):
        left = seconds(1, 256, 65) - seconds(1, 256, 1)
        if left > 0:
            return left
    raise RuntimeError("five runs of 65 tokens took no longer than runs of one; the machine is too busy to measure")


def _rate_of(case: str, seconds: Callable[[int, int, int], float]) -> Callable[[], float]:
    if case.startswith("prefill"):
        length = int(case.removeprefix("prefill"))
        return lambda: length / seconds(1, length, 1)
    if case == "decode1":
        return lambda: 64 / _decoding(seconds)
    if case.startswith("batch"):
        count = int(case.removeprefix("batch"))
        return lambda: count * 64 / seconds(count, 128, 64)
    count = int(case.removeprefix("c"))
    return lambda: count * 32 / seconds(count, 64, 32)
