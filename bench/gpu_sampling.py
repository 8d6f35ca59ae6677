"""Sampling on a device: a batch of rows with temperature, top-k and top-p, as a share of reading the logits once.

torch's softmax and an exponential race, which is how its multinomial draws, stand beside; they know no top-k and top-p.
Logits rotate through more memory than a cache holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from bench.gpu_timing import DEVICE, ROTATING_BYTES, Budget, graph_microseconds, inverted, peer_microseconds
from bench.result import Row

VOCABULARY = 128_256
BATCHES = (1, 16, 64, 256)


def make_sampler(rows: int) -> Callable[[Tensor], object]:
    """The device's, for rows that differ in their seeds alone."""
    from llmscale.layers.triton.sampler.rows import RowSampling, pack_rows
    from llmscale.layers.triton.sampler.sampler import TritonSampler

    asked = [RowSampling(temperature=0.8, top_k=50, top_p=0.95, seed=seed, position=seed) for seed in range(rows)]
    columns = pack_rows(asked, VOCABULARY, DEVICE)
    sampler = TritonSampler(VOCABULARY, rows, DEVICE)
    return lambda logits: sampler.sample(logits, columns)


def sampling_rates(budget: Budget, limits: dict[str, float]) -> Iterator[Row]:
    """Of every batch."""
    for rows in BATCHES:
        if not budget.allows():
            continue
        logits_bytes = 2 * rows * VOCABULARY
        copies = max(2, min(64, ROTATING_BYTES // logits_bytes))
        logits = [(torch.randn(rows, VOCABULARY, device=DEVICE) * 4).bfloat16() for _ in range(copies)]
        sample = make_sampler(rows)
        own = graph_microseconds([lambda one=one, sample=sample: sample(one) for one in logits])
        peer = peer_microseconds([lambda one=one: _softmax_and_draw(one) for one in logits])
        yield Row.of(
            f"sampling/{rows}x{VOCABULARY}",
            "GB/s",
            inverted(own, logits_bytes / 1e3),
            limit=limits.get("copy_gigabytes_per_second"),
            peers={"own us": own.median, "torch softmax and race us": peer},
        )


def _softmax_and_draw(logits: Tensor) -> Tensor:
    # Not `multinomial`, which reads a check of its input back: that cannot be captured.
    likely = logits.float().softmax(-1)
    return (likely / torch.empty_like(likely).exponential_()).argmax(-1)
