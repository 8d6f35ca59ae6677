"""A rank's part of a model: the spec with fewer heads, features, vocabulary rows or layers, and the slices to read.

Column-cut weights give a rank whole output features, row-cut ones whole input features, so that one sum per part of a
layer is all that ranks exchange (Shoeybi et al. 2019, arXiv 1909.08053). Key-value heads are copied where there are
more ranks than heads. Linear in the number of weights, and pure: no torch, no files. It does not know how ranks talk.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from llmscale.errors import ConfigError
from llmscale.models.spec import (
    AttentionSpec,
    BlockSpec,
    HeadSpec,
    LinearSpec,
    MlpSpec,
    ModelSpec,
    ShardAxis,
    TensorSpec,
    WeightSpec,
)
from llmscale.models.stages import stage_layers
from llmscale.quant.layouts import MIN_GROUP

MAX_RANKS = 1_024


@dataclass(frozen=True, slots=True)
class RankPlace:
    """Which part of a replica a rank is: `tensor_rank` of `tensor_size` in `stage` of `stages`."""

    tensor_rank: int = 0
    tensor_size: int = 1
    stage: int = 0
    stages: int = 1

    def __post_init__(self) -> None:
        if self.tensor_size < 1 or self.stages < 1 or self.ranks > MAX_RANKS:
            raise ConfigError(
                f"a replica of {self.tensor_size} x {self.stages} ranks was asked for; both are at least 1, and their"
                f" product at most {MAX_RANKS:,}"
            )
        if not (0 <= self.tensor_rank < self.tensor_size and 0 <= self.stage < self.stages):
            raise ConfigError(
                f"rank {self.tensor_rank} of {self.tensor_size} in stage {self.stage} of {self.stages} does not exist"
            )

    @classmethod
    def of_rank(cls, rank: int, tensor_size: int, stages: int) -> RankPlace:
        """The place of a rank: ranks of one stage are consecutive."""
        return cls(rank % max(1, tensor_size), tensor_size, rank // max(1, tensor_size), stages)

    @property
    def ranks(self) -> int:
        """Ranks of the whole replica."""
        return self.tensor_size * self.stages

    @property
    def rank(self) -> int:
        """Number within the replica."""
        return self.stage * self.tensor_size + self.tensor_rank

    @property
    def is_first_stage(self) -> bool:
        """Whether this rank has the embedding."""
        return self.stage == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank has the head, and samples."""
        return self.stage == self.stages - 1

    @property
    def is_leader(self) -> bool:
        """Whether this rank tells the engine what was sampled."""
        return self.is_last_stage and self.tensor_rank == 0


@dataclass(frozen=True, slots=True)
class TensorSlice:
    """Rows `start..stop` along an axis of a checkpoint's tensor."""

    axis: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class RankModel:
    """What one rank loads and runs. Tensors without a slice are read whole."""

    spec: ModelSpec
    slices: dict[str, TensorSlice]
    first_layer: int
    """Number of its first block in the whole model."""
    vocabulary_start: int
    """First vocabulary id of its rows of the embedding and of the head."""
    vocabulary_widths: tuple[int, ...]
    """Vocabulary rows of each tensor-parallel rank."""


def shard_model(spec: ModelSpec, place: RankPlace) -> RankModel:
    """The part of a place. Raises ConfigError where a model cannot be cut that way, with the sizes that could."""
    if place.ranks == 1:
        return whole_model(spec)
    bounds = stage_layers(spec, place.stages)
    first, last = bounds[place.stage : place.stage + 2]
    ranks = range(place.tensor_size)
    group = None if spec.quantization is None else spec.quantization.layout.input_group
    cut = _Cutter(place, group)
    shares = [_even_share(spec.vocabulary, rank, place.tensor_size, "vocabulary entries") for rank in ranks]
    own_start, own_stop = shares[place.tensor_rank]
    embedding = cut.weight(spec.embedding)
    head = HeadSpec(embedding, spec.head.tied_name) if spec.head.tied else HeadSpec(cut.weight(spec.head.weight))
    blocks = tuple(_block(block, cut) for block in spec.blocks[first:last])
    part = replace(
        spec,
        vocabulary=own_stop - own_start,
        embedding=embedding,
        blocks=blocks,
        head=head,
        pipeline_cuts=(),
        is_first_stage=place.is_first_stage,
        is_last_stage=place.is_last_stage,
    )
    return RankModel(part, cut.slices, first, own_start, tuple(stop - start for start, stop in shares))


def whole_model(spec: ModelSpec) -> RankModel:
    """All of it, for a rank that is alone."""
    return RankModel(spec, {}, 0, 0, (spec.vocabulary,))


def _even_share(units: int, rank: int, size: int, what: str) -> tuple[int, int]:
    """Consecutive units of a rank; sizes differ by one at most."""
    if units < size:
        raise ConfigError(
            f"{size} tensor-parallel ranks were asked for, this model has {units} {what}; use fewer ranks"
        )
    return units * rank // size, units * (rank + 1) // size


def _block(block: BlockSpec, cut: _Cutter) -> BlockSpec:
    attention, mlp = block.attention, block.mlp
    query_heads, kv_heads = cut.heads(attention)
    return replace(
        block,
        attention=replace(
            attention,
            query_heads=query_heads,
            kv_heads=kv_heads,
            qkv=cut.linear(attention.qkv),
            output=cut.linear(attention.output),
        ),
        mlp=_mlp(mlp, cut),
    )


def _mlp(mlp: MlpSpec, cut: _Cutter) -> MlpSpec:
    unit = cut.inner_unit(mlp.inner_size)
    start, stop = _even_share(mlp.inner_size // unit, cut.rank, cut.size, "inner features")
    gate_up, down = (_in_units(linear, unit) for linear in (mlp.gate_up, mlp.down))
    return replace(mlp, gate_up=cut.linear(gate_up), down=cut.linear(down), inner_size=(stop - start) * unit)


def _in_units(linear: LinearSpec, unit: int) -> LinearSpec:
    """The same projection, whose parts are cut at multiples of a unit."""

    def cut_in_units(weight: WeightSpec) -> WeightSpec:
        return replace(weight, parts=tuple(replace(part, shard_multiple=unit) for part in weight.parts))

    bias = linear.bias
    if bias is not None and bias.shard_axis is not ShardAxis.NONE:
        bias = cut_in_units(bias)
    return LinearSpec(cut_in_units(linear.weight), bias)


class _Cutter:
    """Cuts weights for one place and keeps the slices. `group`: input features that share a scale."""

    def __init__(self, place: RankPlace, group: int | None = None) -> None:
        self._group = group
        self.rank = place.tensor_rank
        self.size = place.tensor_size
        self.slices: dict[str, TensorSlice] = {}

    def heads(self, attention: AttentionSpec) -> tuple[int, int]:
        """Query and key-value heads of the rank."""
        size, queries, kv = self.size, attention.query_heads, attention.kv_heads
        if queries % size != 0 or (kv % size != 0 and size % kv != 0):
            fitting = [n for n in range(1, queries + 1) if queries % n == 0 and (kv % n == 0 or n % kv == 0)]
            raise ConfigError(
                f"{size} tensor-parallel ranks were asked for; {queries} query heads and {kv} key-value heads can be"
                f" cut into {', '.join(map(str, fitting))}"
            )
        return queries // size, max(1, kv // size)

    def inner_unit(self, inner_size: int) -> int:
        """What inner features are cut into: whole groups of quantized weights where there are enough of them, else
        halves and quarters of groups that kernels can compute, else single features."""
        unit = 1 if self._group is None else self._group
        while unit >= MIN_GROUP and unit % 2 == 0 and (inner_size % unit != 0 or inner_size // unit < self.size):
            unit //= 2
        return unit if unit >= MIN_GROUP and inner_size % unit == 0 else 1

    def linear(self, linear: LinearSpec) -> LinearSpec:
        bias = linear.bias
        if linear.weight.shard_axis is ShardAxis.ROW and self.rank != 0:
            # Partial sums are added up: one rank adds the bias.
            bias = None
        return LinearSpec(self.weight(linear.weight), None if bias is None else self.weight(bias))

    def weight(self, weight: WeightSpec) -> WeightSpec:
        if weight.shard_axis is ShardAxis.NONE or self.size == 1:
            return weight
        axis = 1 if weight.shard_axis is ShardAxis.ROW else 0
        return replace(weight, parts=tuple(self._tensor(part, axis) for part in weight.parts))

    def _tensor(self, part: TensorSpec, axis: int) -> TensorSpec:
        units = part.shape[axis] // part.shard_multiple
        if units < self.size and part.shard_multiple > 1:
            # Fewer heads than ranks: neighbours share one.
            start = units * self.rank // self.size
            stop = start + 1
        else:
            start, stop = _even_share(units, self.rank, self.size, f"pieces of {part.name}")
        cut = TensorSlice(axis, start * part.shard_multiple, stop * part.shard_multiple)
        self.slices[part.name] = cut
        shape = tuple(cut.stop - cut.start if at == axis else size for at, size in enumerate(part.shape))
        return replace(part, shape=shape)
