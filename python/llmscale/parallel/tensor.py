"""Where the tensors of tensor-parallel ranks meet: one interface, three ways.

`Alone` is a group of one and costs nothing. `CoreGroup` serves CPUs: an all-reduce of one row takes about 3 us in the
shared memory of a host and 30 to 60 over a TCP stream, where gloo needs 200 to 1,400, and every rank gets the same
bits either way. `TorchGroup` is torch.distributed, for GPUs.
It does not know models, what is added up or what the dealt rows are.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Protocol

import torch
import torch.distributed
from torch import Tensor

from llmscale._core import RankMemory, RankStreams


class TensorGroup(Protocol):
    """The ranks that share each layer. Every rank makes the same calls with the same shapes in the same order."""

    @property
    def rank(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def kind(self) -> str:
        """A word for how sums are made, for the numerics id: another order gives other last bits."""

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks of a contiguous tensor, which may be overwritten. Raises WorkerError."""

    def deal_rows(self, own: Tensor, widths: Sequence[int], bounds: Sequence[int], out: Tensor) -> Tensor:
        """All columns of the rows `bounds[rank]` to `bounds[rank + 1]`, [own rows, sum of widths], from each rank's
        contiguous [R, widths[rank]]; in `out`, or `own` itself for one rank. Raises WorkerError."""

    def gather_words(self, words: Tensor, bounds: Sequence[int]) -> None:
        """Completes int32 [N] on the CPU, of which rank r has filled `bounds[r]` to `bounds[r + 1]`. Raises
        WorkerError."""


class Alone:
    """One rank."""

    rank = 0
    size = 1
    kind = "tp"

    def sum(self, tensor: Tensor) -> Tensor:
        """See `TensorGroup`."""
        return tensor

    def deal_rows(self, own: Tensor, widths: Sequence[int], bounds: Sequence[int], out: Tensor) -> Tensor:
        """See `TensorGroup`."""
        return own

    def gather_words(self, words: Tensor, bounds: Sequence[int]) -> None:
        """See `TensorGroup`."""


class CoreGroup:
    """Ranks on CPUs, of one host in memory or of several over streams. Sums are added in the order of ranks, in
    float32, and rounded once, however they travel."""

    kind = "tp"

    def __init__(self, exchange: RankMemory | RankStreams, rank: int, size: int) -> None:
        self._exchange = exchange
        self.rank = rank
        self.size = size

    def sum(self, tensor: Tensor) -> Tensor:
        """See `TensorGroup`."""
        assert tensor.is_contiguous(), tensor.stride()
        self._exchange.sum((tensor.data_ptr(), tensor.numel()))
        return tensor

    def deal_rows(self, own: Tensor, widths: Sequence[int], bounds: Sequence[int], out: Tensor) -> Tensor:
        """See `TensorGroup`."""
        assert own.is_contiguous(), own.stride()
        assert out.is_contiguous(), out.stride()
        self._exchange.deal_rows((own.data_ptr(), own.numel()), widths, bounds, (out.data_ptr(), out.numel()))
        return out

    def gather_words(self, words: Tensor, bounds: Sequence[int]) -> None:
        """See `TensorGroup`."""
        assert words.is_contiguous(), words.stride()
        self._exchange.gather_words((words.data_ptr(), words.numel()), bounds)


class TorchGroup:
    """Ranks anywhere, over a process group of torch.distributed, whose time-out is the deadline of every call."""

    def __init__(self, group: torch.distributed.ProcessGroup) -> None:
        self._group = group
        self.kind = f"tp-{torch.distributed.get_backend(group)}"
        self.rank = torch.distributed.get_rank(group)
        self.size = torch.distributed.get_world_size(group)

    def sum(self, tensor: Tensor) -> Tensor:
        """See `TensorGroup`."""
        torch.distributed.all_reduce(tensor, group=self._group)
        return tensor

    def deal_rows(self, own: Tensor, widths: Sequence[int], bounds: Sequence[int], out: Tensor) -> Tensor:
        """See `TensorGroup`. Each rank sends every other one its columns of that one's rows, and nothing else."""
        dealt = bounds[self.rank + 1] - bounds[self.rank]
        arriving = [dealt * width for width in widths]
        leaving = [(end - start) * own.shape[1] for start, end in pairwise(bounds)]
        parts = own.new_empty(sum(arriving))
        torch.distributed.all_to_all_single(parts, own.view(-1), arriving, leaving, group=self._group)
        ends = pairwise(accumulate(arriving, initial=0))
        columns = [parts[start:end].view(dealt, width) for (start, end), width in zip(ends, widths, strict=True)]
        torch.cat(columns, dim=1, out=out)
        return out

    def gather_words(self, words: Tensor, bounds: Sequence[int]) -> None:
        """See `TensorGroup`. A sum with zeros for what others have filled: one collective, however uneven the parts."""
        words[: bounds[self.rank]].zero_()
        words[bounds[self.rank + 1] :].zero_()
        torch.distributed.all_reduce(words, group=self._group)
