"""The operations of a decoder on the CPU kernels of the core.

Each method hands addresses of contiguous tensors to one kernel; nothing is copied and no Python runs per row. The
results of a row depend neither on other rows, nor on chunking, nor on the number of threads. It does not know models
or schedules, and it computes on CPUs only.
"""

from __future__ import annotations

from torch import Tensor

from llmscale._core import CpuKernels
from llmscale.layers.ops import AttentionConstants, KvLayer, StepRows
from llmscale.models.spec import AttentionSpec


def _memory(tensor: Tensor) -> tuple[int, int]:
    """Address and number of elements. A tensor with gaps would be read past its end, so it is refused here."""
    assert tensor.is_contiguous(), f"a kernel needs contiguous memory, not strides {tensor.stride()}"
    return tensor.data_ptr(), tensor.numel()


class NativeOps:
    """`Ops` over `CpuKernels`; one step at a time."""

    __slots__ = ("_attention_key", "_kernels", "_rows")

    def __init__(self, kernels: CpuKernels) -> None:
        self._kernels = kernels
        self._rows: StepRows | None = None
        self._attention_key: tuple[int, int | None, int] | None = None

    def begin_step(self, rows: StepRows) -> None:
        """Takes the rows; the geometry follows with the first layer."""
        self._rows = rows
        self._attention_key = None

    def embed(self, token_ids: Tensor, table: Tensor, out: Tensor) -> None:
        """`out[t] = table[token_ids[t]]`: int32 [T], [V, H], [T, H]."""
        self._kernels.embed(_memory(token_ids), _memory(table), table.shape[1], _memory(out))

    def rms_norm(self, x: Tensor, weight: Tensor, epsilon: float, out: Tensor) -> None:
        """`out = x / sqrt(mean(x^2) + epsilon) * weight` over the last axis: [T, H], [H], [T, H]."""
        self._kernels.rms_norm(_memory(x), _memory(weight), epsilon, _memory(out))

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, epsilon: float, out: Tensor) -> None:
        """`residual += x`, then `out = rms_norm(residual)`: [T, H] each."""
        self._kernels.add_rms_norm(_memory(x), _memory(residual), _memory(weight), epsilon, _memory(out))

    def rotate_and_store(self, qkv: Tensor, attention: AttentionConstants, kv: KvLayer, query: Tensor) -> None:
        """Normalizes and rotates query and key heads of qkv [T, (Q + 2 K) D]; keys and values go to their slots."""
        self._prepare(attention.spec, kv.region)
        norms = attention.norms
        spec = attention.spec
        self._kernels.rotate_and_store(
            kv.layer,
            _memory(qkv),
            spec.query_heads,
            _memory(attention.rope.cosines),
            _memory(attention.rope.sines),
            2 * attention.rope.cosines.shape[1],
            None if norms is None else (_memory(norms.query), _memory(norms.key), norms.epsilon),
            _memory(query),
            _memory(kv.region),
        )

    def attend(self, query: Tensor, attention: AttentionConstants, kv: KvLayer, out: Tensor) -> None:
        """Causal attention over each sequence's keys and values: [T, Q D] both."""
        self._prepare(attention.spec, kv.region)
        self._kernels.attend(kv.layer, _memory(query), _memory(kv.region), _memory(out))

    def silu_mul(self, gate_up: Tensor, out: Tensor) -> None:
        """`out = silu(gate) * up`: [T, 2 F] with gate first, [T, F]."""
        self._kernels.silu_mul(_memory(gate_up), out.shape[1], _memory(out))

    def _prepare(self, spec: AttentionSpec, region: Tensor) -> None:
        """Checks and divides the step once; layers of the same geometry share it."""
        key = (spec.query_heads, spec.window_tokens, region.data_ptr())
        if self._attention_key == key:
            return
        rows = self._rows
        assert rows is not None, "begin_step comes before the layers of a step"
        blocks, layers, _, kv_heads, block_tokens, head_dim = region.shape
        self._kernels.begin_step(
            (blocks, layers, kv_heads, block_tokens, head_dim),
            spec.query_heads,
            spec.scale,
            spec.window_tokens,
            _memory(rows.positions),
            _memory(rows.slot_mapping),
            _memory(rows.query_start),
            _memory(rows.sequence_lengths),
            _memory(rows.table_offsets),
            _memory(rows.block_tables),
        )
        self._attention_key = key
