"""`Ops` on Triton kernels, for CUDA devices.

Each method is one launch or two; nothing is copied, allocated or read back, and what a step does to memory follows from
its tensors alone, so a step of decodes can be captured in a CUDA graph. In a captured graph sequences may be missing:
one with no row between its bounds in `query_start` is left out, and rows past the last bound are computed by nobody
but the row-wise operations. Attention of one row per sequence and of chunks are different kernels; which sequences are
which is decided on the device. It does not know models, schedules or graphs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llmscale.layers.ops import AttentionConstants, KvLayer, StepRows
from llmscale.layers.triton.chunk_attention import launch_chunks
from llmscale.layers.triton.decode_attention import PartialResults, launch_decode
from llmscale.layers.triton.elementwise import launch_embed, launch_silu_mul
from llmscale.layers.triton.launch import require_dense
from llmscale.layers.triton.norm import launch_rms_norm
from llmscale.layers.triton.rotary import launch_rotate_and_store
from llmscale.layers.triton.tiling import AttentionShape, DeviceShape, chunk_tiling, decode_tiling
from llmscale.models.spec import AttentionSpec


@dataclass(frozen=True, slots=True)
class OpsLimits:
    """The largest step that `TritonOps` is built for."""

    max_sequences: int
    max_sequence_tokens: int


class TritonOps:
    """See `Ops` for shapes. All layers have the query heads, KV heads and head size of `spec`."""

    __slots__ = ("_chunk_tiling", "_decode_tiling", "_room", "_rows", "_shape")

    def __init__(
        self,
        spec: AttentionSpec,
        dtype: torch.dtype,
        limits: OpsLimits,
        device: torch.device,
        device_shape: DeviceShape | None = None,
    ) -> None:
        """Allocates the room for partial results of decodes, all that it ever allocates."""
        device_shape = device_shape or DeviceShape.of(device)
        self._shape = AttentionShape(spec.query_heads, spec.kv_heads, spec.head_dim, dtype.itemsize)
        self._decode_tiling = decode_tiling(self._shape, device_shape, limits.max_sequence_tokens)
        self._chunk_tiling = chunk_tiling(self._shape, device_shape)
        # Fewer sequences are cut into more parts, so no step needs more than the most of these products.
        parts = (count * self._decode_tiling.parts(count) for count in range(1, limits.max_sequences + 1))
        lines = spec.query_heads * max(parts)
        self._room = PartialResults(
            torch.empty(lines * spec.head_dim, dtype=torch.float32, device=device),
            torch.empty(lines, dtype=torch.float32, device=device),
        )
        self._rows: StepRows | None = None

    def begin_step(self, rows: StepRows) -> None:
        """Keeps the rows: int32 tensors on the device."""
        require_dense(
            positions=rows.positions,
            slot_mapping=rows.slot_mapping,
            query_start=rows.query_start,
            sequence_lengths=rows.sequence_lengths,
            table_offsets=rows.table_offsets,
            block_tables=rows.block_tables,
        )
        assert rows.query_start.shape[0] == rows.sequence_lengths.shape[0] + 1
        self._rows = rows

    def embed(self, token_ids: Tensor, table: Tensor, out: Tensor) -> None:
        """`out[t] = table[token_ids[t]]`; NaN for an id outside the vocabulary."""
        launch_embed(token_ids, table, out)

    def rms_norm(self, x: Tensor, weight: Tensor, epsilon: float, out: Tensor) -> None:
        """`out = x / sqrt(mean(x^2) + epsilon) * weight` over the last axis: [T, H], [H], [T, H]."""
        launch_rms_norm(x, None, weight, epsilon, out)

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, epsilon: float, out: Tensor) -> None:
        """`residual += x`, then `out = rms_norm(residual)`: [T, H] each."""
        launch_rms_norm(x, residual, weight, epsilon, out)

    def rotate_and_store(self, qkv: Tensor, attention: AttentionConstants, kv: KvLayer, query: Tensor) -> None:
        """Normalizes and rotates query and key heads of qkv [T, (Q + 2 K) D]; keys and values go to their slots."""
        launch_rotate_and_store(qkv, attention, self._begun(), kv, query)

    def attend(self, query: Tensor, attention: AttentionConstants, kv: KvLayer, out: Tensor) -> None:
        """Causal attention over each sequence's keys and values: [T, Q D] both."""
        rows, spec = self._begun(), attention.spec
        shape = AttentionShape(spec.query_heads, spec.kv_heads, spec.head_dim, query.dtype.itemsize)
        assert shape == self._shape, f"built for {self._shape}, not for {shape}"
        require_dense(query=query, out=out, region=kv.region)
        launch_decode(query, attention, rows, kv, out, self._decode_tiling, self._room)
        # As many sequences as rows: one row each, or padding with none.
        if rows.positions.shape[0] > rows.sequence_lengths.shape[0]:
            launch_chunks(query, attention, rows, kv, out, self._chunk_tiling)

    def silu_mul(self, gate_up: Tensor, out: Tensor) -> None:
        """`out = silu(gate) * up`: [T, 2 F] with gate first, [T, F]."""
        launch_silu_mul(gate_up, out)

    def _begun(self) -> StepRows:
        assert self._rows is not None, "begin_step comes before the layers of a step"
        return self._rows
