"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864) of the halves kind, with linear and Llama 3 scaling.

Owns the frequencies, the table of cosines and sines that every layer shares, and the reference rotation. The table is
made once: one row per position up to the longest sequence that is served, 4 bytes times head_dim each. Frequencies are
computed in float32 step by step as transformers does, because a difference of one rounding in a frequency grows with
the position. It does not know which layer's heads it rotates.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from llmscale.layers.ops import RopeTable
from llmscale.models.spec import RopeScaling, RopeSpec


def inverse_frequencies(rope: RopeSpec, head_dim: int) -> Tensor:
    """Float32 [head_dim / 2], radians per position, descending."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    frequencies = 1.0 / (rope.theta**exponents)
    if rope.scaling is RopeScaling.LINEAR:
        return frequencies / rope.factor
    if rope.scaling is RopeScaling.LLAMA3:
        return _llama3(frequencies, rope)
    return frequencies


def _llama3(frequencies: Tensor, rope: RopeSpec) -> Tensor:
    """Scaling of Llama 3.1: long waves are stretched, short ones kept, those between blended linearly."""
    longest_kept = rope.original_tokens / rope.high_frequency_factor
    shortest_stretched = rope.original_tokens / rope.low_frequency_factor
    wavelengths = 2 * math.pi / frequencies
    stretched = torch.where(wavelengths > shortest_stretched, frequencies / rope.factor, frequencies)
    kept_share = (rope.original_tokens / wavelengths - rope.low_frequency_factor) / (
        rope.high_frequency_factor - rope.low_frequency_factor
    )
    blended = (1 - kept_share) * stretched / rope.factor + kept_share * stretched
    between = (wavelengths >= longest_kept) & (wavelengths <= shortest_stretched)
    return torch.where(between, blended, stretched)


def rope_table(rope: RopeSpec, head_dim: int, positions: int, device: torch.device) -> RopeTable:
    """The table for positions 0 to `positions` - 1, computed on the CPU so that it is the same on every device."""
    angles = torch.arange(positions, dtype=torch.int64).float()[:, None] * inverse_frequencies(rope, head_dim)
    return RopeTable(angles.cos().to(device), angles.sin().to(device))


def rotate(heads: Tensor, table: RopeTable, positions: Tensor) -> Tensor:
    """Rotates element i with element i + D/2 of every head: heads [T, heads, D], int32 positions [T].

    Float32 inside, rounded once to the dtype of `heads`.
    """
    cosines = table.cosines.index_select(0, positions)[:, None]
    sines = table.sines.index_select(0, positions)[:, None]
    first, second = heads.float().chunk(2, dim=-1)
    return torch.cat((first * cosines - second * sines, second * cosines + first * sines), dim=-1).to(heads.dtype)
