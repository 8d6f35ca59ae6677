"""The torch executor: runs a spec's layers over one step and returns the logits of the rows that this rank samples.

Matrix products are torch's, everything else goes through `Ops`. Buffers are made once for the largest step, so a step
allocates nothing but what the operations themselves need; no Python runs per token or per sequence here. Python costs
about nine calls per layer. A rank of several runs its part of each layer, or its stage's layers, and meets the others
through `Ranks`. It does not know sampling, scheduling or where weights came from.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from llmscale.devices.cpu import CpuDevice
from llmscale.devices.interface import Device
from llmscale.layers.activations import (
    ActivationBuffers,
    Activations,
    ActivationSizes,
    ProductInput,
    padded_rows,
)
from llmscale.layers.attention import Attention
from llmscale.layers.embedding import Embedding, ShardedEmbedding
from llmscale.layers.linear import Linear
from llmscale.layers.mlp import GatedMlp
from llmscale.layers.norm import RmsNorm
from llmscale.layers.ops import AttentionConstants, HeadNorms, Ops, RopeTable
from llmscale.layers.rotary import rope_table
from llmscale.models.loader import Weights
from llmscale.models.spec import AttentionSpec, BlockSpec, HeadSpec, LinearSpec, ModelSpec, NormSpec, RopeSpec
from llmscale.parallel.layout import row_bounds
from llmscale.parallel.pipeline import StageLink
from llmscale.parallel.tensor import Alone, TensorGroup
from llmscale.quant.layouts import Quantization
from llmscale.quant.weight import QuantizedWeight
from llmscale.worker.kv_region import KvRegion
from llmscale.worker.step import StepInputs, StepLimits


class Block:
    """One layer with its two norms, ready to run."""

    __slots__ = ("attention", "attention_norm", "mlp", "mlp_norm")

    def __init__(self, attention_norm: RmsNorm, attention: Attention, mlp_norm: RmsNorm, mlp: GatedMlp) -> None:
        self.attention_norm = attention_norm
        self.attention = attention
        self.mlp_norm = mlp_norm
        self.mlp = mlp


@dataclass(frozen=True, slots=True)
class Ranks:
    """Whom a rank computes with. By default it is alone."""

    tensor: TensorGroup = field(default_factory=Alone)
    stage: StageLink | None = None
    """Needed where the spec is a stage of several."""
    vocabulary_start: int = 0
    """First id of this rank's rows of embedding and head."""
    vocabulary_widths: tuple[int, ...] = ()
    """Rows of every rank; empty for a rank that is alone."""

    @property
    def are_alone(self) -> bool:
        """Whether one rank is the whole replica."""
        return self.tensor.size == 1 and self.stage is None


class TorchExecutor:
    """A model, or a rank's part of it, on the device that holds its weights and KV region.

    `linear_kind` names how products are computed, and with what quantized weights; it is part of what makes tokens
    repeatable.
    """

    def __init__(
        self,
        spec: ModelSpec,
        weights: Weights,
        kv_region: KvRegion,
        ops: Ops,
        limits: StepLimits,
        ranks: Ranks | None = None,
        device: Device | None = None,
    ) -> None:
        """Takes the projections out of `weights` one by one, so that a model is not held twice while it is tiled.

        `device` lays out quantized weights; without one they are laid out for the CPU.
        """
        assert kv_region.tensor.dtype == weights.dtype, (kv_region.tensor.dtype, weights.dtype)
        assert limits.max_sequence_tokens <= spec.max_sequence_tokens, (limits, spec.max_sequence_tokens)
        self._ops = ops
        self._limits = limits
        self._ranks = ranks or Ranks()
        self.use_region(kv_region)
        where = kv_region.tensor.device
        build = _Builder(weights, spec.quantization, limits.max_sequence_tokens, where, device or CpuDevice())
        self._embedding = build.embedding(spec, self._ranks) if spec.is_first_stage else None
        self._blocks = [build.block(block) for block in spec.blocks]
        self._buffers = ActivationBuffers(_widths(spec), limits.max_step_tokens, weights.dtype, where)
        self._output = _Output(spec, build, limits, self._ranks) if spec.is_last_stage else None
        self.linear_kind = build.linear_kind
        self.logits_dtype = weights.dtype
        self.logits_width = 0 if self._output is None else self._output.width

    def use_region(self, kv_region: KvRegion) -> None:
        """Steps read and write another region from now on."""
        self._kv_layers = [kv_region.layer(layer) for layer in range(kv_region.layout.layers)]

    def forward(self, step: StepInputs) -> Tensor:
        """Logits [own rows, vocabulary] in the weights' dtype, valid until the next call, of the sampling rows that are
        dealt to this rank: all of them for one that is alone in its stage, none before the last stage.

        Writes the step's keys and values to the region. A sequence's rows must be complete up to its length. On another
        device than the CPU the caller has moved the step's tensors there. Raises WorkerError for a rank that is gone.
        """
        assert 0 < step.rows <= self._limits.max_step_tokens, (step.rows, self._limits.max_step_tokens)
        assert step.samples <= self._limits.max_sequences, (step.samples, self._limits.max_sequences)
        with torch.inference_mode():
            ops, rows = self._ops, self._buffers.rows(step.rows)
            ops.begin_step(step)
            self._begin(step, rows)
            delta = self._run_layers(rows)
            if self._output is None:
                stage = self._ranks.stage
                assert stage is not None, "a stage that is not the last has one behind it"
                stage.send_stream(rows.residual.add_(delta))
                return rows.residual[:0]
            return self._output(ops, step, rows, delta)

    def _begin(self, step: StepInputs, rows: Activations) -> None:
        """Fills the residual stream: from the ids, or from the stage before."""
        if self._embedding is not None:
            self._embedding(self._ops, step.token_ids, rows.residual)
            return
        stage = self._ranks.stage
        assert stage is not None, "a stage that is not the first has one before it"
        stage.receive_stream(rows.residual)

    def _run_layers(self, rows: Activations) -> Tensor:
        """What the last part adds to the residual stream, [T, H]."""
        ops, add_up = self._ops, self._ranks.tensor.sum
        delta: Tensor | None = None
        for block, kv_layer in zip(self._blocks, self._kv_layers, strict=True):
            # The output of a part is added by the norm of the next one, in one pass over the stream.
            if delta is None:
                block.attention_norm(ops, rows.residual, rows.normed.rows)
            else:
                block.attention_norm.after_add(ops, delta, rows.residual, rows.normed.rows)
            delta = add_up(block.attention(ops, rows, kv_layer))
            block.mlp_norm.after_add(ops, delta, rows.residual, rows.normed.rows)
            delta = add_up(block.mlp(ops, rows))
        assert delta is not None, "a model has at least one block"
        return delta


class _Output:
    """Norm and head of the last stage, for the rows that sample."""

    def __init__(self, spec: ModelSpec, build: _Builder, limits: StepLimits, ranks: Ranks) -> None:
        self._norm = build.norm(spec.norm)
        self._head = build.head(spec.head)
        self._tensor = ranks.tensor
        self._widths = ranks.vocabulary_widths or (spec.vocabulary,)
        self.width = sum(self._widths)
        max_samples = padded_rows(limits.max_sequences)
        self._sampled = build.zeros(max_samples, spec.hidden_size)
        self._logits = build.zeros(max_samples, spec.vocabulary)
        # A rank that is alone has the whole vocabulary already.
        max_dealt = row_bounds(max_samples, ranks.tensor.size)[1] if ranks.tensor.size > 1 else 0
        self._dealt = build.zeros(max_dealt, sum(self._widths))

    def __call__(self, ops: Ops, step: StepInputs, rows: Activations, delta: Tensor) -> Tensor:
        """Logits [own rows, vocabulary] after the stream has got the last delta."""
        self._norm.after_add(ops, delta, rows.residual, rows.normed.rows)
        if step.samples == 0:
            return self._logits[:0]
        padded = padded_rows(step.samples)
        sampled = ProductInput(self._sampled[: step.samples], self._sampled[:padded])
        torch.index_select(rows.normed.rows, 0, step.sample_rows, out=sampled.rows)
        own = self._head(sampled, self._logits[:padded])
        bounds = row_bounds(step.samples, self._tensor.size)
        dealt = bounds[self._tensor.rank + 1] - bounds[self._tensor.rank]
        return self._tensor.deal_rows(own, self._widths, bounds, self._dealt[:dealt])


class _Builder:
    """Makes layers from their specs; layers with equal rope share one table."""

    def __init__(
        self,
        weights: Weights,
        quantization: Quantization | None,
        max_sequence_tokens: int,
        where: torch.device,
        device: Device,
    ) -> None:
        self._weights = weights
        self._quantization = quantization
        self._kinds: set[str] = set()
        self._max_sequence_tokens = max_sequence_tokens
        self._device = where
        self._make_product = device.product
        self._dense_product = device.dense(weights.dtype)
        self._tables: dict[tuple[RopeSpec, int], RopeTable] = {}

    def zeros(self, rows: int, columns: int) -> Tensor:
        return torch.zeros(rows, columns, dtype=self._weights.dtype, device=self._device)

    def embedding(self, spec: ModelSpec, ranks: Ranks) -> Embedding | ShardedEmbedding:
        table = self._weights[spec.embedding]
        if ranks.tensor.size == 1:
            return Embedding(table)
        return ShardedEmbedding(table, ranks.vocabulary_start, ranks.tensor.sum)

    def block(self, spec: BlockSpec) -> Block:
        return Block(
            self.norm(spec.attention_norm),
            self._attention(spec.attention),
            self.norm(spec.mlp_norm),
            GatedMlp(self._linear(spec.mlp.gate_up), self._linear(spec.mlp.down)),
        )

    def norm(self, spec: NormSpec) -> RmsNorm:
        return RmsNorm(self._weights[spec.weight], spec.epsilon)

    def _attention(self, spec: AttentionSpec) -> Attention:
        norms = None
        if spec.query_norm is not None and spec.key_norm is not None:
            assert spec.query_norm.epsilon == spec.key_norm.epsilon
            norms = HeadNorms(
                self._weights[spec.query_norm.weight], self._weights[spec.key_norm.weight], spec.query_norm.epsilon
            )
        key = (spec.rope, spec.head_dim)
        if key not in self._tables:
            self._tables[key] = rope_table(spec.rope, spec.head_dim, self._max_sequence_tokens, self._device)
        constants = AttentionConstants(spec, norms, self._tables[key])
        return Attention(constants, self._linear(spec.qkv), self._linear(spec.output))

    def head(self, spec: HeadSpec) -> Linear:
        """A tied head has tiles of its own, at the price of one more table: a lookup needs rows, a product tiles."""
        if spec.tied:
            return self._dense(self._weights[spec.weight], None)
        return self._product(self._weights.take(spec.weight), None)

    @property
    def linear_kind(self) -> str:
        """Of what has been built."""
        return "+".join([self._dense_product.kind, *sorted(self._kinds)])

    def _linear(self, spec: LinearSpec) -> Linear:
        bias = None if spec.bias is None else self._weights[spec.bias]
        return self._product(self._weights.take(spec.weight), bias)

    def _product(self, weight: Tensor | QuantizedWeight, bias: Tensor | None) -> Linear:
        if not isinstance(weight, QuantizedWeight):
            return self._dense(weight, bias)
        quantization = self._quantization
        assert quantization is not None, "a quantized weight in a model that is not"
        product = self._make_product(quantization.layout, weight, bias, self._weights.dtype)
        self._kinds.add(f"{quantization.label}-{product.kind}")
        return Linear(product)

    def _dense(self, weight: Tensor, bias: Tensor | None) -> Linear:
        return Linear(self._dense_product(weight, bias))


def _widths(spec: ModelSpec) -> ActivationSizes:
    def widest(width: Callable[[BlockSpec], int]) -> int:
        widths = {width(block) for block in spec.blocks}
        # Buffers are dense rows; layers of different widths would need one set per width.
        assert len(widths) == 1, widths
        return widths.pop()

    return ActivationSizes(
        hidden=spec.hidden_size,
        query=widest(lambda block: block.attention.query_size),
        qkv=widest(lambda block: block.attention.query_size + 2 * block.attention.kv_size),
        inner=widest(lambda block: block.mlp.inner_size),
    )
