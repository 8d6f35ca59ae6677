"""What a case of kernels against their oracle needs: rows of a step, poisoned memory, a comparison that says how far.

A case is a function of a device that raises AssertionError. The same cases run on the CPU under Triton's interpreter
and on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Case = Callable[[torch.device], None]


def poisoned(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory that shows what was not written."""
    return torch.full(shape, float("nan"), dtype=dtype, device=device)


def require_close(name: str, given: Tensor, expected: Tensor, tolerance: float) -> None:
    """The greatest difference, relative to 1 or to the expected value where that is more."""
    assert given.shape == expected.shape, (name, given.shape, expected.shape)
    wide, truth = given.double().cpu(), expected.double().cpu()
    broken = int((~torch.isfinite(wide)).sum())
    assert broken == 0, f"{name}: {broken} of {wide.numel()} elements are not finite"
    worst = float(((wide - truth).abs() / truth.abs().clamp(min=1.0)).max())
    assert worst <= tolerance, f"{name}: off by {worst:.3g}, allowed are {tolerance:.3g}"


def require_same(name: str, given: Tensor, expected: Tensor) -> None:
    """Every bit but those of NaN."""
    assert torch.equal(given.nan_to_num(nan=123.0), expected.nan_to_num(nan=123.0)), f"{name} differs"


@dataclass(frozen=True, slots=True)
class Rows:
    """A `StepRows`."""

    positions: Tensor
    slot_mapping: Tensor
    query_start: Tensor
    sequence_lengths: Tensor
    table_offsets: Tensor
    block_tables: Tensor


def step_rows(
    spans: Sequence[tuple[int, int]],
    block_tokens: int,
    blocks: int,
    device: torch.device,
    generator: torch.Generator,
    padding_rows: int = 0,
) -> Rows:
    """Rows for sequences of (length, rows), decodes first as an engine sends them, with blocks scattered over the
    region. Table entries that no sequence owns would index far outside. `padding_rows` hold what a graph's would."""
    order = torch.randperm(blocks, generator=generator).tolist()
    longest = max(-(-length // block_tokens) for length, _ in spans) + 1
    tables = torch.full((len(spans) * longest,), 2**30, dtype=torch.int32)
    positions: list[int] = []
    slots: list[int] = []
    starts = [0]
    for sequence, (length, rows) in enumerate(spans):
        own = [order.pop() for _ in range(-(-length // block_tokens))]
        tables[sequence * longest : sequence * longest + len(own)] = torch.tensor(own, dtype=torch.int32)
        span = range(length - rows, length)
        positions.extend(span)
        slots.extend(own[at // block_tokens] * block_tokens + at % block_tokens for at in span)
        starts.append(starts[-1] + rows)
    positions += [0] * padding_rows
    slots += [2**30] * padding_rows

    def int32(values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    return Rows(
        int32(positions),
        int32(slots),
        int32(starts),
        int32([length for length, _ in spans]),
        int32([sequence * longest for sequence in range(len(spans))]),
        tables.to(device),
    )
