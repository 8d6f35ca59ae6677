"""Where a block can absorb scales of a product's inputs exactly, and how they are folded in.

Inputs of q, k, v and of gate, up come from a norm, whose weight is divided; those of the output projection from the
values, several query heads from one; those of down from up. What is divided is stored in its own dtype, so scales are
adjusted until the division is exact there. Costs one search per product. It does not know files or codes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmscale.calibration.dense_block import DenseBlock, Product
from llmscale.calibration.statistics import SampledRows
from llmscale.models.spec import AttentionSpec
from llmscale.quant.channel_scales import Absorb, powers_of_two, searched_scales
from llmscale.quant.method import QuantMethod


def scale_block(
    block: DenseBlock, sampled: dict[Product, SampledRows], method: QuantMethod, dtypes: dict[str, torch.dtype]
) -> int:
    """Folds the best scales into a block's weights; returns how many products got any.

    `dtypes` are those in which norms and biases will be stored. Raises ConfigError for a width that groups do not
    divide.
    """
    found = 0
    for product in Product:
        source = _Source(block, product, dtypes)
        rows = sampled[product]
        magnitudes = source.channels(rows.magnitudes)
        weight = block.weights[block.linear(product).weight.name]
        scales = searched_scales(weight, rows.rows, magnitudes, method, source.absorb, source.spread)
        if scales is not None:
            block.weights[block.linear(product).weight.name] = weight * source.spread(scales)
            source.divide(scales)
            found += 1
    return found


class _Source:
    """What produces the inputs of a product."""

    def __init__(self, block: DenseBlock, product: Product, dtypes: dict[str, torch.dtype]) -> None:
        self._block = block
        self._product = product
        self._dtypes = dtypes
        norms = {Product.QKV: block.spec.attention_norm, Product.GATE_UP: block.spec.mlp_norm}
        self._norm = norms.get(product)

    @property
    def absorb(self) -> Absorb:
        """Adjusts scales so that dividing by them is exact where the source is stored."""
        if self._norm is not None:
            return self._absorbed_by_norm
        return powers_of_two if self._rows_of()[1] is not None else _unchanged

    def channels(self, magnitudes: Tensor) -> Tensor:
        """Magnitudes of channels from those of inputs."""
        if self._product is not Product.OUTPUT:
            return magnitudes
        spec = self._block.spec.attention
        return magnitudes.view(spec.kv_heads, _share(spec), spec.head_dim).mean(dim=1).flatten()

    def spread(self, scales: Tensor) -> Tensor:
        """Scales of inputs from those of channels."""
        if self._product is not Product.OUTPUT:
            return scales
        spec = self._block.spec.attention
        by_head = scales.view(spec.kv_heads, 1, spec.head_dim)
        return by_head.expand(spec.kv_heads, _share(spec), spec.head_dim).flatten()

    def divide(self, scales: Tensor) -> None:
        """Divides what produces the channels."""
        weights = self._block.weights
        if self._norm is not None:
            name = self._norm.weight.name
            weights[name] = self._divided_norm(scales)
            return
        first, bias = self._rows_of()
        source = self._source_weight()
        rows = slice(first, first + scales.shape[0])
        weights[source] = weights[source].clone()
        weights[source][rows] /= scales[:, None]
        if bias is not None:
            weights[bias] = weights[bias].clone()
            weights[bias][rows] /= scales

    def _divided_norm(self, scales: Tensor) -> Tensor:
        assert self._norm is not None
        name = self._norm.weight.name
        return (self._block.weights[name] / scales).to(self._dtypes[name]).float()

    def _absorbed_by_norm(self, wanted: Tensor) -> Tensor:
        assert self._norm is not None
        before, after = self._block.weights[self._norm.weight.name], self._divided_norm(wanted)
        # A weight of zero, or one that would become zero or infinite, keeps its scale of one.
        usable = (before != 0) & (after != 0) & after.isfinite()
        return torch.where(usable, before / torch.where(usable, after, 1.0), 1.0)

    def _source_weight(self) -> str:
        spec = self._block.spec
        linear = spec.attention.qkv if self._product is Product.OUTPUT else spec.mlp.gate_up
        return linear.weight.name

    def _rows_of(self) -> tuple[int, str | None]:
        """First output of the source that is a channel, and the source's bias."""
        spec = self._block.spec
        if self._product is Product.OUTPUT:
            linear, first = spec.attention.qkv, spec.attention.query_size + spec.attention.kv_size
        else:
            linear, first = spec.mlp.gate_up, spec.mlp.inner_size
        return first, None if linear.bias is None else linear.bias.name


def _share(attention: AttentionSpec) -> int:
    """Query heads that read one KV head."""
    return attention.query_heads // attention.kv_heads


def _unchanged(scales: Tensor) -> Tensor:
    return scales
