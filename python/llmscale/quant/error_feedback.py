"""Error feedback (GPTQ, Frantar et al. 2022, arXiv 2210.17323): codes are chosen input by input, and what rounding one
input loses is made good by those that have not been rounded yet.

How much of an error an input can take over is read from the second moments of the activations, X^T X, whose inverse is
factored once (Cholesky, cubic in the inputs). Inputs are rounded in the order of their energy on grids that were laid
before, so that the order is gone when it is done: the checkpoint needs no index of groups. Memory: three matrices of
inputs x inputs in float64, the moments that are given, their copy in order and one factor, which is inverted in place.
It does not know models, files or where activations come from.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llmscale.errors import ConfigError
from llmscale.quant.grid import CodeGrid
from llmscale.quant.method import GriddedMethod
from llmscale.quant.weight import QuantizedWeight

MAX_INPUTS = 32_768
"""Input features of a weight: three matrices of their square take 26 GB."""
DAMPING = 0.01
"""Share of the mean energy that is added to every input's own, as in the paper."""
MAX_DAMPING = 1.0
COLUMNS_TOGETHER = 128
"""Inputs after whose rounding the rest of the weight is corrected at once; between, only these are."""
SHARES = tuple(1 - step / 20 for step in range(11))
"""Of a group's range that its grid may span: a narrower grid cuts off outliers and rounds everything else finer."""


@dataclass(frozen=True, slots=True)
class FeedbackOptions:
    """`uses_order`: round inputs of much energy first. `searches_range`: choose each group's grid by its error."""

    uses_order: bool = True
    searches_range: bool = True


def fed_back(
    weight: Tensor, moments: Tensor, method: GriddedMethod, options: FeedbackOptions | None = None
) -> QuantizedWeight:
    """Quantizes a weight [N, K] for activations with second moments `moments` [K, K], float32 or float64.

    Raises ConfigError for a width that groups do not divide, one over MAX_INPUTS, or moments that are not finite.
    """
    options = options or FeedbackOptions()
    inputs = weight.shape[1]
    if inputs > MAX_INPUTS:
        raise ConfigError(
            f"A weight has {inputs:,} input features, the limit of error feedback is {MAX_INPUTS:,} (MAX_INPUTS)."
            " Quantize this model without --calibrate."
        )
    # One sum: asking each number makes copies of the matrix.
    if not bool(moments.sum(dtype=torch.float64).isfinite()):
        raise ConfigError(
            "Activations of the calibration texts are not finite numbers: the model overflows float32 on them. Use"
            " other texts, or quantize without --calibrate."
        )
    weight = weight.float()
    energy = moments.diagonal().float()
    grid = searched_grid(weight, energy, method) if options.searches_range else method.grid(weight)
    order = energy.argsort(descending=True, stable=True) if options.uses_order else torch.arange(inputs)
    # The name is given to the copy, so that moments which nobody else holds are gone before the factor is made.
    moments = moments[order[:, None], order].double()
    factor = _inverse_factor(moments)
    del moments
    return method.coded(grid, _codes(weight, grid, order, factor.float()))


def searched_grid(weight: Tensor, energy: Tensor, method: GriddedMethod) -> CodeGrid:
    """The grid of each group whose rounding loses least, inputs weighed by `energy` [K]."""
    best = method.grid(weight, SHARES[0])
    least = _losses(weight, energy, best)
    for share in SHARES[1:]:
        grid = method.grid(weight, share)
        losses = _losses(weight, energy, grid)
        better = losses < least
        best, least = best.where(better, grid), torch.where(better, losses, least)
    return best


def _losses(weight: Tensor, energy: Tensor, grid: CodeGrid) -> Tensor:
    """Of each output and group, [N, K / group_size]."""
    errors = (grid.values(grid.codes(weight)) - weight).square_().mul_(energy)
    losses: Tensor = errors.view(*grid.scales.shape, grid.group_size).sum(dim=2)
    return losses


def _inverse_factor(moments: Tensor) -> Tensor:
    """The upper Cholesky factor of the inverse of damped moments [K, K], float64. Damps `moments` itself."""
    energy = moments.diagonal().clone()
    mean = energy.mean().clamp_min(1e-30)
    damping = DAMPING
    while True:
        moments.diagonal().copy_(energy + damping * mean)
        factor, failed = torch.linalg.cholesky_ex(moments)
        if not bool(failed):
            torch.cholesky_inverse(factor, out=factor)
            torch.linalg.cholesky_ex(factor, upper=True, out=(factor, failed))
            if not bool(failed):
                found: Tensor = factor
                return found
        del factor
        # Rounding of nearly singular moments; ten times as much damping has always been enough.
        damping *= 10
        assert damping <= MAX_DAMPING, "moments that are finite and symmetric have a factor when they are damped"


def _codes(weight: Tensor, grid: CodeGrid, order: Tensor, factor: Tensor) -> Tensor:
    """Codes [N, K] in the natural order of inputs."""
    left = weight[:, order].contiguous()
    codes = torch.empty_like(weight)
    groups = (order // grid.group_size).tolist()
    places = order.tolist()
    for start in range(0, len(places), COLUMNS_TOGETHER):
        stop = min(start + COLUMNS_TOGETHER, len(places))
        errors = torch.empty(weight.shape[0], stop - start)
        for place in range(start, stop):
            column, group = left[:, place], groups[place]
            chosen = grid.column_codes(column, group)
            codes[:, places[place]] = chosen
            error = (column - grid.column_values(chosen, group)) / factor[place, place]
            left[:, place:stop].addr_(error, factor[place, place:stop], alpha=-1)
            errors[:, place - start] = error
        left[:, stop:].addmm_(errors, factor[start:stop, stop:], alpha=-1)
    return codes
