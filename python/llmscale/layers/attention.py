"""Grouped-query attention over paged keys and values: the reference arithmetic and the module of the executor.

The reference gathers each sequence's blocks and computes softmax(Q K^T) V in float32, one sequence after another; it
exists to be right, and native operations are tested against it. Quadratic in the length of a chunk, linear in the
length of the context for a decode. It does not know how blocks are chosen.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmscale.layers.activations import Activations
from llmscale.layers.linear import Linear
from llmscale.layers.norm import rms_norm
from llmscale.layers.ops import AttentionConstants, KvLayer, Ops, StepRows
from llmscale.layers.rotary import rotate
from llmscale.models.spec import AttentionSpec


def split_heads(qkv: Tensor, attention: AttentionSpec) -> tuple[Tensor, Tensor, Tensor]:
    """Views of [T, (Q + 2 K) D] as query [T, Q, D], key [T, K, D] and value [T, K, D]."""
    heads = qkv.view(-1, attention.query_heads + 2 * attention.kv_heads, attention.head_dim)
    first_key, first_value = attention.query_heads, attention.query_heads + attention.kv_heads
    return heads[:, :first_key], heads[:, first_key:first_value], heads[:, first_value:]


def rotate_and_store(qkv: Tensor, attention: AttentionConstants, rows: StepRows, kv_layer: Tensor) -> Tensor:
    """Reference of `Ops.rotate_and_store`: returns the rotated query heads [T, Q D]; kv_layer [B, 2, K, P, D]."""
    query, key, value = split_heads(qkv, attention.spec)
    norms, rope = attention.norms, attention.rope
    if norms is not None:
        query = rms_norm(query, norms.query, norms.epsilon)
        key = rms_norm(key, norms.key, norms.epsilon)
    slots = rows.slot_mapping.long()
    blocks, offsets = slots // kv_layer.shape[3], slots % kv_layer.shape[3]
    # Two index tensors around a slice select [T, K, D] in the order that the values have.
    kv_layer[:, 0][blocks, :, offsets] = rotate(key, rope, rows.positions)
    kv_layer[:, 1][blocks, :, offsets] = value
    return rotate(query, rope, rows.positions).flatten(1)


def attend(query: Tensor, attention: AttentionSpec, rows: StepRows, kv_layer: Tensor) -> Tensor:
    """Reference of `Ops.attend`: query and result [T, Q D], kv_layer [B, 2, K, P, D]."""
    heads = query.view(-1, attention.query_heads, attention.head_dim).float()
    block_tokens = kv_layer.shape[3]
    starts, lengths = rows.query_start.tolist(), rows.sequence_lengths.tolist()
    outputs = []
    for sequence, table_offset in enumerate(rows.table_offsets.tolist()):
        first, last, length = starts[sequence], starts[sequence + 1], lengths[sequence]
        blocks = -(-length // block_tokens)
        table = rows.block_tables[table_offset : table_offset + blocks].long()
        # [blocks, K, P, D] to [K, length, D]; slots past the length hold other sequences' old bytes.
        keys, values = (kv_layer[table, part].transpose(0, 1).flatten(1, 2)[:, :length].float() for part in (0, 1))
        outputs.append(_attend_one(heads[first:last], keys, values, rows.positions[first:last], attention))
    return torch.cat(outputs).flatten(1).to(query.dtype)


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

    __slots__ = ("_constants", "_output", "_qkv")

    def __init__(self, constants: AttentionConstants, qkv: Linear, output: Linear) -> None:
        self._constants = constants
        self._qkv = qkv
        self._output = output

    def __call__(self, ops: Ops, activations: Activations, kv: KvLayer) -> Tensor:
        """Reads `activations.normed` for the rows of the step that has begun.

        Returns what is to be added to the stream, [T, H].
        """
        qkv = self._qkv(activations.normed, activations.qkv)
        ops.rotate_and_store(qkv, self._constants, kv, activations.query)
        ops.attend(activations.query, self._constants, kv, activations.heads.rows)
        return self._output(activations.heads, activations.delta)
