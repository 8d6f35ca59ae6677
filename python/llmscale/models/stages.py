"""Where a pipeline is cut: stages of consecutive layers whose slowest takes as little time as any cut allows.

A decoding step reads every weight once, so a layer costs what its weights weigh, and the last stage the head besides:
in a small model with a large vocabulary that is as much as several layers. The head is one large product, where a layer
is four small ones and attention, so a weight of it costs less time. A prompt pays for the head only once, so stages are
a little uneven then. O(stages x cuts^2), pure: every host cuts alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import accumulate, pairwise

from llmscale.errors import ConfigError
from llmscale.models.spec import BlockSpec, LinearSpec, ModelSpec

HEAD_TENTHS = 6
"""Of a layer's time per weight. Measured with 1 to 64 rows: 5 to 7 in a model of 135M parameters, where it moves two of
30 layers and takes 2 to 10 % off the slowest stage; 5 to 9 in one of 4M."""


def stage_layers(spec: ModelSpec, stages: int) -> tuple[int, ...]:
    """First layer of each stage, and the number of layers at the end: S + 1 numbers. Raises ConfigError where the model
    cannot be cut so often."""
    cuts = (0, *spec.pipeline_cuts, len(spec.blocks))
    if stages >= len(cuts):
        raise ConfigError(
            f"{stages} pipeline stages were asked for; this model of {len(spec.blocks)} layers can be cut into"
            f" {len(cuts) - 1} at most"
        )
    layers = list(accumulate((10 * _layer_cost(block) for block in spec.blocks), initial=0))
    # Costs of what lies between two cuts, the head behind the last one.
    between = [layers[stop] - layers[start] for start, stop in pairwise(cuts)]
    return tuple(cuts[at] for at in divide(between, HEAD_TENTHS * spec.head.weight.elements, stages))


def divide(costs: Sequence[int], last_cost: int, parts: int) -> tuple[int, ...]:
    """Bounds of consecutive parts, none empty, whose greatest sum is the least; the last part costs `last_cost` more.

    Of equal cuts, the one whose earlier parts are longest. `len(costs)` is at least `parts`.
    """
    sums = list(accumulate(costs, initial=0))

    @cache
    def least(start: int, left: int) -> tuple[int, int]:
        """Of the best cut of what begins at `start` into `left` parts: the greatest sum, and the end of the first one,
        negative so that of equals the longest is the least."""
        if left == 1:
            return sums[-1] - sums[start] + last_cost, -len(costs)
        ends = range(start + 1, len(costs) - left + 2)
        return min((max(sums[end] - sums[start], least(end, left - 1)[0]), -end) for end in ends)

    bounds = [0]
    for left in range(parts, 0, -1):
        bounds.append(-least(bounds[-1], left)[1])
    return tuple(bounds)


def _layer_cost(block: BlockSpec) -> int:
    attention, mlp = block.attention, block.mlp
    return sum(_elements(linear) for linear in (attention.qkv, attention.output, mlp.gate_up, mlp.down))


def _elements(linear: LinearSpec) -> int:
    return linear.weight.elements
