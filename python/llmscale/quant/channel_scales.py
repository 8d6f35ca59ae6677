"""Activation-aware scales (AWQ, Lin et al. 2023, arXiv 2306.00978): inputs that carry much are made larger before the
weight is rounded, and whoever produces them divides by the same number, so that the product stays what it was.

The scale of an input is a power of its mean magnitude; the exponent is searched on a grid against the method's own
reference, so int8's rounding of activations counts too (SmoothQuant, Xiao et al. 2023, is that case). Costs one
reference product per exponent. It does not know which layer can absorb a scale.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from llmscale.quant.method import QuantMethod

EXPONENTS = tuple(step / 10 for step in range(1, 11))
SMALLEST_SHARE = 1e-4
"""Of the largest magnitude: less counts as this much, or an input that no text used would get a scale of zero."""

Absorb = Callable[[Tensor], Tensor]
"""From wanted scales [C] to those that can be divided out exactly, [C]."""
Spread = Callable[[Tensor], Tensor]
"""From scales of channels [C] to those of inputs [K]; several inputs may come from one channel."""


def searched_scales(
    weight: Tensor,
    rows: Tensor,
    magnitudes: Tensor,
    method: QuantMethod,
    absorb: Absorb,
    spread: Spread,
) -> Tensor | None:
    """Scales [C] for the channels behind the inputs of a weight [N, K], or None where none is better than ones.

    `rows` [R, K] are activations to compare products on, `magnitudes` [C] the channels' mean magnitudes. Raises
    ConfigError for a width that groups do not divide.
    """
    weight, rows = weight.float(), rows.float()
    exact = rows @ weight.t()
    best: Tensor | None = None
    least = _loss(weight, rows, exact, method)
    largest = float(magnitudes.max())
    if largest <= 0:
        return None
    magnitudes = magnitudes.float().clamp_min(SMALLEST_SHARE * largest)
    for exponent in EXPONENTS:
        wanted = magnitudes.pow(exponent)
        scales = absorb(wanted / (wanted.max() * wanted.min()).sqrt())
        inputs = spread(scales)
        loss = _loss(weight * inputs, rows / inputs, exact, method)
        if loss < least:
            best, least = scales, loss
    return best


def powers_of_two(scales: Tensor) -> Tensor:
    """The nearest powers of two, by which every float is divided exactly."""
    return scales.log2().round_().exp2_()


def _loss(weight: Tensor, rows: Tensor, exact: Tensor, method: QuantMethod) -> float:
    return float((method.reference(rows, method.quantize(weight)) - exact).square().mean())
