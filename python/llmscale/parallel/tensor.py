"""Where the tensors of tensor-parallel ranks meet: one interface, three ways.

`Alone` is a group of one and costs nothing. `SharedMemoryGroup` serves ranks of one host on CPUs: an all-reduce of one
row takes about 3 us where gloo needs 60 to 150, and every rank gets the same bits. `TorchGroup` is torch.distributed,
over NCCL or gloo, for everything else. It does not know models or what is added up.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.distributed
from torch import Tensor

from llmscale._core import RankMemory


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

    def gather_columns(self, own: Tensor, widths: Sequence[int], out: Tensor) -> Tensor:
        """[R, sum of widths] from each rank's contiguous [R, widths[rank]]; in `out`, or `own` itself for one rank."""


class Alone:
    """One rank."""

    rank = 0
    size = 1
    kind = "tp"

    def sum(self, tensor: Tensor) -> Tensor:
        """See `TensorGroup`."""
        return tensor

    def gather_columns(self, own: Tensor, widths: Sequence[int], out: Tensor) -> Tensor:
        """See `TensorGroup`."""
        return own


class SharedMemoryGroup:
    """Ranks of one host, on CPUs. Sums are added in the order of ranks, in float32, and rounded once."""

    kind = "tp"

    def __init__(self, memory: RankMemory, rank: int, size: int) -> None:
        self._memory = memory
        self.rank = rank
        self.size = size

    def sum(self, tensor: Tensor) -> Tensor:
        """See `TensorGroup`."""
        assert tensor.is_contiguous(), tensor.stride()
        self._memory.sum((tensor.data_ptr(), tensor.numel()))
        return tensor

    def gather_columns(self, own: Tensor, widths: Sequence[int], out: Tensor) -> Tensor:
        """See `TensorGroup`."""
        assert own.is_contiguous(), own.stride()
        assert out.is_contiguous(), out.stride()
        self._memory.gather_columns((own.data_ptr(), own.numel()), widths, (out.data_ptr(), out.numel()))
        return out


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

    def gather_columns(self, own: Tensor, widths: Sequence[int], out: Tensor) -> Tensor:
        """See `TensorGroup`. Parts are padded to the widest: gloo takes equal sizes only."""
        rows, widest = own.shape[0], max(widths)
        padded = own.new_zeros(rows, widest)
        padded[:, : own.shape[1]] = own
        parts = [torch.empty_like(padded) for _ in widths]
        torch.distributed.all_gather(parts, padded, group=self._group)
        column = 0
        for part, width in zip(parts, widths, strict=True):
            out[:, column : column + width] = part[:, :width]
            column += width
        return out
