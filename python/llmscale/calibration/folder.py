"""Writes a calibrated copy of a dense checkpoint, in the files of `llmscale quantize`.

Block by block: a block's tensors are read, calibrated and written before the next one's are read, so that memory is
that of the hidden states, one block in float32 and the second moments of its widest product. Same model, texts, options
and torch give the same bytes. It does not know how codes are chosen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from llmscale.calibration.block import CalibrationOptions, advance, calibrate_block
from llmscale.calibration.dense_block import DenseBlock, HiddenBatch
from llmscale.errors import ConfigError
from llmscale.layers.ops import RopeTable
from llmscale.layers.rotary import rope_table
from llmscale.models.checkpoint import Progress, match_tensors, open_checkpoint
from llmscale.models.new_folder import new_folder
from llmscale.models.open_files import OpenFiles
from llmscale.models.quantizer import (
    Shards,
    Written,
    copy_rest,
    dense_model,
    projections,
    stored_tensors,
    tensor_bytes,
)
from llmscale.models.registry import ModelDescription
from llmscale.models.spec import BlockSpec, RopeSpec, WeightSpec
from llmscale.models.tied_tables import refuse_different_tables
from llmscale.quant.layouts import Layout
from llmscale.quant.method import GriddedMethod, gridded_method_for
from llmscale.quant.weight import QuantizedWeight

MAX_HIDDEN_BYTES = 2 << 30
"""Of hidden states, which are held twice while a block is run."""
MAX_BATCH_TOKENS = 4_096


@dataclass(frozen=True, slots=True)
class Calibrated:
    """What came of it."""

    written: Written
    sequences: int
    tokens: int
    scaled: int
    """Products whose inputs were scaled, of four per block."""


def quantize_calibrated(
    source: Path,
    target: Path,
    layout: Layout,
    sequences: Sequence[Sequence[int]],
    options: CalibrationOptions | None = None,
    progress: Progress | None = None,
) -> Calibrated:
    """Writes `target`, a new folder, with codes chosen for `sequences` of token ids. `progress` counts blocks.

    Raises ModelError for a source that is no dense model, and ConfigError for a layout without a grid, a target that
    exists, a width that groups do not divide, or texts that do not fit the model.
    """
    method = gridded_method_for(layout)
    if method is None:
        raise ConfigError(f"{layout.method} weights are not calibrated, only int8 and int4; leave --calibrate out")
    model = dense_model(source)
    _check(sequences, model)
    _check_widths(model, method)
    with new_folder(target) as making, torch.inference_mode():
        run = _Run(model, making, method, options or CalibrationOptions())
        scaled = run.blocks(sequences, progress)
        copy_rest(model, making, layout)
    tokens = sum(map(len, sequences))
    return Calibrated(run.written, len(sequences), tokens, scaled)


def _check(sequences: Sequence[Sequence[int]], model: ModelDescription) -> None:
    spec = model.spec
    tokens = sum(map(len, sequences))
    if tokens == 0:
        raise ConfigError("there are no calibration texts; give some")
    size = 4 * tokens * spec.hidden_size
    if size > MAX_HIDDEN_BYTES:
        raise ConfigError(
            f"{tokens:,} calibration tokens take {size:,} bytes of hidden states, the limit is {MAX_HIDDEN_BYTES:,}"
            f" (MAX_HIDDEN_BYTES); {MAX_HIDDEN_BYTES // (4 * spec.hidden_size):,} tokens fit. Use fewer texts."
        )
    longest = max(map(len, sequences))
    if longest > spec.max_sequence_tokens:
        raise ConfigError(
            f"a calibration text has {longest:,} tokens, the model allows {spec.max_sequence_tokens:,}"
            f" ({spec.max_sequence_reason}). Cut it."
        )
    highest = max(map(max, filter(None, sequences)))
    if highest >= spec.vocabulary:
        raise ConfigError(f"a calibration text has id {highest:,}, the model's vocabulary is {spec.vocabulary:,}.")


def _check_widths(model: ModelDescription, method: GriddedMethod) -> None:
    """Refuses a width by its weight's name before anything is searched, which takes minutes."""
    for block in model.spec.blocks:
        for linear in (block.attention.qkv, block.attention.output, block.mlp.gate_up, block.mlp.down):
            try:
                method.grid(torch.zeros(1, linear.weight.shape[1]))
            except ConfigError as error:
                raise ConfigError(f"{linear.weight.parts[0].name!r}: {error}") from error


class _Run:
    """One pass over a checkpoint."""

    def __init__(
        self, model: ModelDescription, making: Path, method: GriddedMethod, options: CalibrationOptions
    ) -> None:
        self._model = model
        self._method = method
        self._options = options
        self._checkpoint = open_checkpoint(model.folder)
        match_tensors(model.spec, self._checkpoint)
        refuse_different_tables(model.spec, self._checkpoint)
        self._shards = Shards(making)
        self._tables: dict[tuple[RopeSpec, int], RopeTable] = {}

    @property
    def written(self) -> Written:
        return Written(tensor_bytes(self._checkpoint), self._shards.total_bytes, len(projections(self._model)))

    def blocks(self, sequences: Sequence[Sequence[int]], progress: Progress | None) -> int:
        """Reads, calibrates and writes everything. Returns how many products were scaled."""
        spec, scaled = self._model.spec, 0
        left = set(self._checkpoint.tensors)
        with OpenFiles(self._checkpoint, [], None) as files:
            batches = _embedded(files, spec.embedding, self._embedding_name(), sequences)
            longest = max(map(len, sequences))
            for number, block_spec in enumerate(spec.blocks):
                names = list(_names(block_spec))
                scaled += self._block(files, block_spec, batches, longest)
                left.difference_update(names)
                if progress is not None:
                    progress(number + 1, len(spec.blocks))
            for name in sorted(left):
                self._shards.add({name: files.read(name, ()).clone()})
        self._shards.finish()
        return scaled

    def _block(self, files: OpenFiles, spec: BlockSpec, batches: list[HiddenBatch], longest: int) -> int:
        tensors = {name: files.read(name, ()) for name in _names(spec)}
        dtypes: dict[str, torch.dtype] = {}
        weights: dict[str, Tensor] = {}
        for weight in _weights(spec):
            parts = [tensors[part.name] for part in weight.parts]
            # The dtype of a fused bias is that of its first part; the parts of one product are stored alike.
            dtypes[weight.name] = parts[0].dtype
            weights[weight.name] = torch.cat([part.float() for part in parts])
        rope = self._rope(spec, longest)
        block = DenseBlock(spec, weights, rope)
        made = calibrate_block(block, batches, self._method, dtypes, self._options)
        for weight in _weights(spec):
            self._store(weight, block.weights[weight.name], tensors, made.parts)
        batches[:] = advance(block, batches)
        return made.scaled

    def _store(
        self, weight: WeightSpec, values: Tensor, tensors: dict[str, Tensor], quantized: dict[str, QuantizedWeight]
    ) -> None:
        row = 0
        for part in weight.parts:
            made = quantized.get(part.name)
            if made is not None:
                self._shards.add(stored_tensors(part.name, made, self._method))
            else:
                rows = values.narrow(0, row, part.shape[0])
                self._shards.add({part.name: rows.to(tensors[part.name].dtype, copy=True)})
            row += part.shape[0]

    def _rope(self, spec: BlockSpec, positions: int) -> RopeTable:
        key = (spec.attention.rope, spec.attention.head_dim)
        if key not in self._tables:
            self._tables[key] = rope_table(*key, positions, torch.device("cpu"))
        return self._tables[key]

    def _embedding_name(self) -> str:
        """A tied table may be stored under the head's name alone."""
        spec = self._model.spec
        name = spec.embedding.parts[0].name
        tied = spec.head.tied_name
        return name if tied is None or name in self._checkpoint.tensors else tied


def _weights(spec: BlockSpec) -> list[WeightSpec]:
    found = [spec.attention_norm.weight, spec.mlp_norm.weight]
    for norm in (spec.attention.query_norm, spec.attention.key_norm):
        found += [] if norm is None else [norm.weight]
    for linear in (spec.attention.qkv, spec.attention.output, spec.mlp.gate_up, spec.mlp.down):
        found += [linear.weight] if linear.bias is None else [linear.weight, linear.bias]
    return found


def _names(spec: BlockSpec) -> list[str]:
    return [part.name for weight in _weights(spec) for part in weight.parts]


def _embedded(files: OpenFiles, weight: WeightSpec, name: str, sequences: Sequence[Sequence[int]]) -> list[HiddenBatch]:
    """Batches of sequences of similar length, shortest first, as the embedding gives them."""
    table = files.read(name, ())
    assert table.shape == weight.shape, (table.shape, weight.shape)
    ordered = sorted((list(sequence) for sequence in sequences if len(sequence) > 0), key=len)
    batches: list[HiddenBatch] = []
    rows: list[list[int]] = []
    for sequence in ordered:
        if rows and (len(rows) + 1) * len(sequence) > MAX_BATCH_TOKENS:
            batches.append(_batch(table, rows))
            rows = []
        rows.append(sequence)
    batches.append(_batch(table, rows))
    return batches


def _batch(table: Tensor, rows: list[list[int]]) -> HiddenBatch:
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    return HiddenBatch(table[ids].float(), tuple(map(len, rows)))
