"""What a device that is none computes with: the native kernels under the rules of kernels for captured graphs.

Sequences without a row between their bounds are left out, rows past the last bound write no key and no value and get
NaN from attention: whoever reads them is found out. So are chunks in a step of as many sequences as rows, for which no
kernel for chunks is launched. The sampler is the processor's, from the device's columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from llmscale._core import CpuKernels, PackedStep
from llmscale.layers.native import NativeOps
from llmscale.layers.ops import AttentionConstants, KvLayer, StepRows
from llmscale.layers.triton.sampler.rows import SamplingRows
from tests.fakes.fake_device.graphs import kernel
from tests.fakes.fake_device.machine import Machine


@dataclass(frozen=True, slots=True)
class _Rows:
    positions: Tensor
    slot_mapping: Tensor
    query_start: Tensor
    sequence_lengths: Tensor
    table_offsets: Tensor
    block_tables: Tensor


class FakeOps:
    """See `Ops`."""

    def __init__(self, machine: Machine, kernels: CpuKernels) -> None:
        self._machine = machine
        self._native = NativeOps(kernels)
        self._rows = 0

    def begin_step(self, rows: StepRows) -> None:
        tensors = (rows.positions, rows.slot_mapping, rows.query_start, rows.sequence_lengths, rows.table_offsets)
        with kernel(self._machine, *tensors, rows.block_tables):
            starts = rows.query_start.tolist()
            self._rows = starts[-1]
            there = sum(last > first for first, last in pairwise(starts))
            assert starts[there] == self._rows, f"sequences that are absent come last: {starts}"
            if len(rows.positions) == len(rows.sequence_lengths) and there < self._rows:
                raise self._machine.broken("a chunk of a prompt is in a step that has room for single rows alone")
            self._native.begin_step(
                _Rows(
                    rows.positions[: self._rows],
                    rows.slot_mapping[: self._rows],
                    rows.query_start[: there + 1],
                    rows.sequence_lengths[:there],
                    rows.table_offsets[:there],
                    rows.block_tables,
                )
            )

    def embed(self, token_ids: Tensor, table: Tensor, out: Tensor) -> None:
        with kernel(self._machine, token_ids, table, out):
            self._native.embed(token_ids, table, out)

    def rms_norm(self, x: Tensor, weight: Tensor, epsilon: float, out: Tensor) -> None:
        with kernel(self._machine, x, weight, out):
            self._native.rms_norm(x, weight, epsilon, out)

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, epsilon: float, out: Tensor) -> None:
        with kernel(self._machine, x, residual, weight, out):
            self._native.add_rms_norm(x, residual, weight, epsilon, out)

    def rotate_and_store(self, qkv: Tensor, attention: AttentionConstants, kv: KvLayer, query: Tensor) -> None:
        with kernel(self._machine, qkv, kv.region, query):
            if self._rows > 0:
                self._native.rotate_and_store(qkv[: self._rows], attention, kv, query[: self._rows])
            query[self._rows :] = float("nan")

    def attend(self, query: Tensor, attention: AttentionConstants, kv: KvLayer, out: Tensor) -> None:
        with kernel(self._machine, query, kv.region, out):
            if self._rows > 0:
                self._native.attend(query[: self._rows], attention, kv, out[: self._rows])
            out[self._rows :] = float("nan")

    def silu_mul(self, gate_up: Tensor, out: Tensor) -> None:
        with kernel(self._machine, gate_up, out):
            self._native.silu_mul(gate_up, out)


class FakeSampler:
    """See `DeviceSampler`."""

    def __init__(self, machine: Machine, kernels: CpuKernels, vocabulary: int, max_rows: int) -> None:
        self._machine = machine
        self._kernels = kernels
        self._vocabulary = vocabulary
        self.max_rows = -(-max_rows // 4) * 4
        self.drawn = torch.zeros(PackedStep.drawn_entries(self.max_rows), dtype=torch.int32)

    def sample(self, logits: Tensor, rows: SamplingRows) -> None:
        columns = (
            rows.temperature, rows.top_p, rows.min_p, rows.repetition_penalty, rows.presence_penalty,
            rows.frequency_penalty, rows.top_k, rows.choice, rows.position, rows.top_logprobs, rows.seed_low,
            rows.seed_high, rows.change_start,
        )  # fmt: skip
        changes = (rows.change_token, rows.change_count, rows.change_flags, rows.change_bias)
        assert logits.shape == (rows.temperature.shape[0], self._vocabulary), (logits.shape, rows.temperature.shape)
        with kernel(self._machine, logits, *columns, *changes, self.drawn):
            self._kernels.sample_columns(
                _memory(logits),
                self._vocabulary,
                [_memory(column) for column in columns],
                [_memory(change) for change in changes],
                _memory(self.drawn),
                self.max_rows,
            )

    def hand_on(self, drawn_from: Tensor, token_ids: Tensor) -> None:
        with kernel(self._machine, drawn_from, token_ids, self.drawn):
            for row, place in enumerate(drawn_from.tolist()):
                if place > 0:
                    token_ids[row] = self.drawn[self.max_rows + place - 1]


def _memory(tensor: Tensor) -> tuple[int, int]:
    assert tensor.is_contiguous(), tensor.stride()
    return tensor.data_ptr(), tensor.numel()
