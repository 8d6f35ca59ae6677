"""Frequencies of a rotary position embedding (Su et al. 2021, arXiv 2104.09864), with linear and Llama 3 scaling.

Computed in float32 step by step, because a difference of one rounding in a frequency grows with the position, and
models were trained with such frequencies. Linear in the size of a head, without torch. It does not know positions.
"""

from __future__ import annotations

import ctypes
import math

from llmscale.models.spec import RopeScaling, RopeSpec


def inverse_frequencies(rope: RopeSpec, head_dim: int) -> list[float]:
    """`head_dim / 2` frequencies in radians per position, descending; each is a float32."""
    exponents = [_rounded(element / head_dim) for element in range(0, head_dim, 2)]
    frequencies = [_rounded(1.0 / _rounded(rope.theta**exponent)) for exponent in exponents]
    if rope.scaling is RopeScaling.LINEAR:
        return [_rounded(frequency / rope.factor) for frequency in frequencies]
    if rope.scaling is RopeScaling.LLAMA3:
        return [_llama3(frequency, rope) for frequency in frequencies]
    return frequencies


def _llama3(frequency: float, rope: RopeSpec) -> float:
    """Scaling of Llama 3.1: long waves are stretched, short ones kept, those between blended linearly."""
    wavelength = _rounded(2 * math.pi / frequency)
    stretched = _rounded(frequency / rope.factor)
    if wavelength < rope.original_tokens / rope.high_frequency_factor:
        return frequency
    if wavelength > rope.original_tokens / rope.low_frequency_factor:
        return stretched
    kept_share = _rounded(
        _rounded(_rounded(rope.original_tokens / wavelength) - rope.low_frequency_factor)
        / (rope.high_frequency_factor - rope.low_frequency_factor)
    )
    return _rounded(
        _rounded(_rounded(_rounded(1 - kept_share) * frequency) / rope.factor) + _rounded(kept_share * frequency)
    )


def _rounded(value: float) -> float:
    """To float32."""
    return ctypes.c_float(value).value
