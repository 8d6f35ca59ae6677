"""Gradients of one step, summed over small batches that single-threaded workers take as they become free.

One process with n torch threads waits at every operator for the slowest; on a machine whose cores are shared that
halved the speed (1,500 tokens/s at 1.1 of 2 cores). Workers meet once per step instead. The sum is in the order of the
batches, hence independent of which worker did what. Knows nothing of the optimizer or of files.
"""

from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tinychat.dataset import FULL_SHAPE, LONG_SHAPE, Batch, BatchShape, BatchStream
from tinychat.model import LlamaWeights, rope_tables

BATCHES_PER_STEP = 4
LONG_EVERY, FULL_EVERY = 60, 240
"""One batch in this many is one row of 1,024 or of 2,048 tokens."""
_LOSS_SCALE = 1.0 / 256.0
"""Fixed, so that every trained token of a step weighs the same in whichever batch it lies."""


@dataclass(frozen=True, slots=True)
class StepGradients:
    """Float32 gradients by name, tokens read, and for every trained token its loss and its task."""

    gradients: dict[str, Tensor]
    tokens: int
    losses: Tensor
    tasks: Tensor


def shape_of(batch_number: int) -> BatchShape:
    if batch_number % FULL_EVERY == FULL_EVERY - 1:
        return FULL_SHAPE
    return LONG_SHAPE if batch_number % LONG_EVERY == LONG_EVERY - 1 else BatchShape()


class GradientWorkers:
    """A pool of single-threaded workers over shared weights; `pool` also serves the optimizer."""

    def __init__(self, weights: LlamaWeights, stream: BatchStream, *, workers: int, compiled: bool) -> None:
        self._weights = weights
        self._stream = stream
        self._names = tuple(name for name, _ in weights.named_parameters())
        self._parameters = tuple(weights.parameters())
        self._forward: Callable[..., Tensor] = weights
        self.pool: Executor = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))
        if compiled:
            self._forward = torch.compile(weights)
            # Compiled once, by one worker, before two of them could race to do it.
            self.pool.submit(self._batch, 0).result()

    def step(self, step: int) -> StepGradients:
        """Gradients of step `step`, counted from 0."""
        numbers = range(step * BATCHES_PER_STEP, (step + 1) * BATCHES_PER_STEP)
        results = list(self.pool.map(self._batch, numbers))
        total = [gradient.float() for gradient in results[0][0]]
        for gradients, *_ in results[1:]:
            torch._foreach_add_(total, [gradient.float() for gradient in gradients])
        return StepGradients(
            dict(zip(self._names, total, strict=True)),
            sum(len(batch.ids) for _, batch, _ in results),
            torch.cat([losses for _, _, losses in results]),
            torch.cat([batch.tasks for _, batch, _ in results]),
        )

    def _batch(self, number: int) -> tuple[tuple[Tensor, ...], Batch, Tensor]:
        shape = shape_of(number)
        batch = self._stream.batch(number, shape)
        cos, sin = (t[:, None].bfloat16() for t in rope_tables(self._weights.shape, batch.positions))
        # Long rows run uncompiled: compiling their two shapes would cost a minute each.
        forward = self._forward if shape == BatchShape() else self._weights
        hidden = forward(batch.ids, cos, sin, batch.groups)
        losses = F.cross_entropy(self._weights.logits(hidden[batch.places]), batch.targets, reduction="none")
        gradients = torch.autograd.grad((losses * batch.weights).sum() * _LOSS_SCALE, self._parameters)
        return gradients, batch, losses.detach()
