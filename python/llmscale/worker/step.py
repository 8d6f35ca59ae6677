"""What an executor gets for one step, and what it promises.

`StepInputs` is a set of views into buffers that the worker's mirror fills in place; making one costs a few slices, no
copy. Decodes come first with one row each, prefill chunks after them. It does not know who plans or samples.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from llmscale.worker.kv_region import KvRegion


@dataclass(frozen=True, slots=True)
class StepInputs:
    """One step of T = `rows` token rows, S = `sequences` sequences and R = `samples` rows that sample.

    All tensors are int32 on the executor's device and valid until the next step is begun. A KV slot is
    `block * block_tokens + offset`.
    """

    rows: int
    sequences: int
    samples: int
    token_ids: Tensor
    """[T]"""
    positions: Tensor
    """[T] absolute positions; those of one sequence ascend by one"""
    slot_mapping: Tensor
    """[T] KV slot that the row's key and value are written to"""
    query_start: Tensor
    """[S + 1] first row of each sequence"""
    sequence_lengths: Tensor
    """[S] KV tokens including this step's rows"""
    table_offsets: Tensor
    """[S] where the sequence's block table begins in `block_tables`"""
    block_tables: Tensor
    """flat block ids; one row of the longest table's length per engine slot"""
    sample_rows: Tensor
    """[R] rows whose hidden state goes to the head, in the order of the result"""


@dataclass(frozen=True, slots=True)
class StepLimits:
    """The largest step that an executor is built for, and the longest sequence in it."""

    max_step_tokens: int
    max_sequences: int
    max_sequence_tokens: int


class Executor(Protocol):
    """Computes steps in order on one device."""

    logits_dtype: torch.dtype
    logits_width: int
    """Ids that a row of logits has, or 0 before the last stage."""

    def forward(self, step: StepInputs) -> Tensor:
        """Logits [own rows, vocabulary] of the sampled rows that are dealt to this rank: contiguous, float32 or
        bfloat16, valid until the next call."""

    def use_region(self, kv_region: KvRegion) -> None:
        """Steps read and write another region from now on."""
