"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864) of the halves kind.

Owns the table of cosines and sines that every layer shares, and the reference rotation. The table is made once: one row
per position up to the longest sequence that is served, 4 bytes times head_dim each. It does not know which layer's
heads it rotates.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmscale.layers.ops import RopeTable
from llmscale.models.rope import inverse_frequencies
from llmscale.models.spec import RopeSpec


def rope_table(rope: RopeSpec, head_dim: int, positions: int, device: torch.device) -> RopeTable:
    """The table for positions 0 to `positions` - 1, computed on the CPU so that it is the same on every device."""
    angles = torch.arange(positions, dtype=torch.int64).float()[:, None] * torch.tensor(
        inverse_frequencies(rope, head_dim)
    )
    return RopeTable(angles.cos().to(device), angles.sin().to(device))


def rotate(heads: Tensor, table: RopeTable, positions: Tensor) -> Tensor:
    """Rotates element i with element i + D/2 of every head: heads [T, heads, D], int32 positions [T].

    Float32 inside, rounded once to the dtype of `heads`.
    """
    cosines = table.cosines.index_select(0, positions)[:, None]
    sines = table.sines.index_select(0, positions)[:, None]
    first, second = heads.float().chunk(2, dim=-1)
    return torch.cat((first * cosines - second * sines, second * cosines + first * sines), dim=-1).to(heads.dtype)
