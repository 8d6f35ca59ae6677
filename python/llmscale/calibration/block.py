"""Quantizes one block for the hidden states that reach it: scales first, then codes, product after product.

Scales are searched on the block as it is. Then each product's codes are chosen for inputs that the products before it,
quantized already, give: later ones make good what earlier ones lost. The block is run six times over the texts, and no
activations are kept but the hidden states between blocks. It does not know files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from llmscale.calibration.dense_block import DenseBlock, HiddenBatch, Product
from llmscale.calibration.scaling import scale_block
from llmscale.calibration.statistics import Moments, SampledRows, chosen_rows, total_tokens
from llmscale.errors import ConfigError
from llmscale.models.quantizer import require_finite
from llmscale.models.spec import WeightSpec
from llmscale.quant.error_feedback import FeedbackOptions, fed_back
from llmscale.quant.method import GriddedMethod
from llmscale.quant.weight import QuantizedWeight


@dataclass(frozen=True, slots=True)
class CalibrationOptions:
    """Which of the two steps are made, and the seed of what is drawn."""

    scales: bool = True
    feedback: bool = True
    feedback_options: FeedbackOptions = field(default_factory=FeedbackOptions)
    seed: int = 0


@dataclass(frozen=True, slots=True)
class CalibratedBlock:
    """The parts of a block's products by the names of their tensors, and how many products were scaled."""

    parts: dict[str, QuantizedWeight]
    scaled: int


def calibrate_block(
    block: DenseBlock,
    batches: Sequence[HiddenBatch],
    method: GriddedMethod,
    dtypes: dict[str, torch.dtype],
    options: CalibrationOptions,
) -> CalibratedBlock:
    """Leaves the block with the weights that its codes stand for. Raises ConfigError that names the weight."""
    scaled = 0
    if options.scales:
        scaled = scale_block(block, _sampled(block, batches, options.seed), method, dtypes)
    parts: dict[str, QuantizedWeight] = {}
    for product in Product:
        spec = block.linear(product).weight
        weight = block.weights[spec.name]
        require_finite(spec.parts[0].name, weight)
        try:
            if options.feedback:
                made = fed_back(weight, _moments(block, batches, product), method, options.feedback_options)
            else:
                made = method.quantize(weight)
        except ConfigError as error:
            raise ConfigError(f"{spec.parts[0].name!r}: {error}") from error
        block.weights[spec.name] = method.dequantize(made)
        parts |= split(made, spec)
    return CalibratedBlock(parts, scaled)


def advance(block: DenseBlock, batches: Sequence[HiddenBatch]) -> list[HiddenBatch]:
    """The hidden states after the block."""
    return [HiddenBatch(block.forward(batch.hidden), batch.lengths) for batch in batches]


def split(weight: QuantizedWeight, spec: WeightSpec) -> dict[str, QuantizedWeight]:
    """The parts of a fused weight by the names of their tensors."""
    found: dict[str, QuantizedWeight] = {}
    first = 0
    for part in spec.parts:
        rows = slice(first, first + part.shape[0])
        zeros = None if weight.zeros is None else weight.zeros[rows]
        found[part.name] = QuantizedWeight(weight.codes[rows], weight.scales[rows], weight.group_size, zeros)
        first += part.shape[0]
    return found


def _sampled(block: DenseBlock, batches: Sequence[HiddenBatch], seed: int) -> dict[Product, SampledRows]:
    chosen = chosen_rows(total_tokens(batch.lengths for batch in batches), seed)
    sampled = {product: SampledRows(chosen) for product in Product}
    for batch in batches:
        for product, inputs in block.all_inputs(batch.hidden).items():
            sampled[product].add(batch.tokens(inputs))
    return sampled


def _moments(block: DenseBlock, batches: Sequence[HiddenBatch], product: Product) -> Tensor:
    moments: Moments | None = None
    for batch in batches:
        rows = batch.tokens(block.inputs(product, batch.hidden))
        moments = moments or Moments(rows.shape[1])
        moments.add(rows)
    assert moments is not None, "there is at least one batch"
    return moments.sums
