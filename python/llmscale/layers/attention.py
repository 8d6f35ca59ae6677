"""Grouped-query attention over paged keys and values: the reference arithmetic and the module of the executor.

The reference gathers each sequence's blocks and computes softmax(Q K^T) V in float32, one sequence after another; it
exists to be right, and native operations are tested against it. Quadratic in the length of a chunk, linear in the length
of the context for a decode. It does not know how blocks are chosen.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmscale.layers.activations import Activations
from llmscale.layers.linear import Linear
from llmscale.layers.norm import rms_norm
from llmscale.layers.ops import HeadNorms, Ops, StepRows
from llmscale.layers.rotary import rotate
from llmscale.models.spec import AttentionSpec


def split_heads(qkv: Tensor, attention: AttentionSpec) -> tuple[Tensor, Tensor, Tensor]:
    """Views of [T, (Q + 2 K) D] as query [T, Q, D], key [T, K, D] and value [T, K, D]."""
    heads = qkv.view(-1, attention.query_heads + 2 * attention.kv_heads, attention.head_dim)
    first_key, first_value = attention.query_heads, attention.query_heads + attention.kv_heads
    return heads[:, :first_key], heads[:, first_key:first_value], heads[:, first_value:]


def rotate_and_store(
    qkv: Tensor,
    attention: AttentionSpec,
    norms: HeadNorms | None,
    rope_table: Tensor,
    rows: StepRows,
    kv_layer: Tensor,
) -> None:
    """Reference of `Ops.rotate_and_store`; shapes are given there."""
    query, key, value = split_heads(qkv, attention)
    normed_query, normed_key = query, key
    if norms is not None:
        normed_query = rms_norm(query, norms.query, norms.epsilon)
        normed_key = rms_norm(key, norms.key, norms.epsilon)
    table_rows = rope_table.index_select(0, rows.positions)
    query.copy_(rotate(normed_query, table_rows))
    slots = rows.slot_mapping.long()
    blocks, offsets = slots // kv_layer.shape[3], slots % kv_layer.shape[3]
    # Two index tensors around a slice select [T, K, D] in the order that the values have.
    kv_layer[:, 0][blocks, :, offsets] = rotate(normed_key, table_rows)
    kv_layer[:, 1][blocks, :, offsets] = value


def attend(qkv: Tensor, attention: AttentionSpec, rows: StepRows, kv_layer: Tensor) -> Tensor:
    """Reference of `Ops.attend`: returns [T, Q D] in the dtype of `qkv`."""
    query = split_heads(qkv, attention)[0]
    block_tokens = kv_layer.shape[3]
    starts, lengths = rows.query_start.tolist(), rows.sequence_lengths.tolist()
    outputs = []
    for sequence, table_offset in enumerate(rows.table_offsets.tolist()):
        first, last, length = starts[sequence], starts[sequence + 1], lengths[sequence]
        blocks = -(-length // block_tokens)
        table = rows.block_tables[table_offset : table_offset + blocks].long()
        # [blocks, K, P, D] to [K, length, D]; slots past the length hold other sequences' old bytes.
        keys, values = (kv_layer[table, part].transpose(0, 1).flatten(1, 2)[:, :length].float() for part in (0, 1))
        outputs.append(_attend_one(query[first:last].float(), keys, values, rows.positions[first:last], attention))
    return torch.cat(outputs).flatten(1).to(qkv.dtype)


def _attend_one(query: Tensor, keys: Tensor, values: Tensor, positions: Tensor, attention: AttentionSpec) -> Tensor:
    """One sequence: query [n, Q, D], keys and values [K, length, D], positions [n]; returns [n, Q, D]; all float32."""
    group = attention.query_heads // attention.kv_heads
    length = keys.shape[1]
    assert int(positions[-1]) == length - 1, (int(positions[-1]), length)
    keys, values = keys.repeat_interleave(group, dim=0), values.repeat_interleave(group, dim=0)
    scores = query.transpose(0, 1) @ keys.transpose(1, 2) * attention.scale
    distance = positions[:, None] - torch.arange(length, device=positions.device)[None, :]
    hidden = distance < 0
    if attention.window_tokens is not None:
        hidden |= distance >= attention.window_tokens
    scores.masked_fill_(hidden, float("-inf"))
    return (scores.softmax(dim=-1) @ values).transpose(0, 1)


class Attention:
    """Projection, norms and rotation, paged attention, projection back."""

    __slots__ = ("_norms", "_output", "_qkv", "_rope_table", "_spec")

    def __init__(
        self, spec: AttentionSpec, qkv: Linear, output: Linear, norms: HeadNorms | None, rope_table: Tensor
    ) -> None:
        self._spec = spec
        self._qkv = qkv
        self._output = output
        self._norms = norms
        self._rope_table = rope_table

    def __call__(self, ops: Ops, activations: Activations, rows: StepRows, kv_layer: Tensor) -> None:
        """Reads `activations.normed` and writes `activations.delta`; kv_layer [B, 2, K, P, D]."""
        self._qkv(activations.normed, activations.qkv)
        ops.rotate_and_store(activations.qkv, self._spec, self._norms, self._rope_table, rows, kv_layer)
        ops.attend(activations.qkv, self._spec, rows, kv_layer, activations.heads)
        self._output(activations.heads, activations.delta)
