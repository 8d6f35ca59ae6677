"""A packed step on its way to a device and there: pinned memory that it is packed into, and one run of device memory.

The core packs a step so that one transfer moves it, block tables in use included and no others: with 256 sequences of
2,000 tokens that is 70 KiB, where the mirror's own tables take 4 MiB at 128k tokens per sequence. So the mirror's
memory is not pinned, and may be written again as soon as a step is packed. Staging memory may only be packed into
again when its transfer is done. Views of device memory are cut once per size. It does not know what computes.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from llmscale._core import PackedStep
from llmscale.devices.interface import Accelerator, Event, Stream
from llmscale.layers.triton.sampler.rows import SamplingRows
from llmscale.worker.step import StepInputs, StepLimits
from llmscale.worker.steps import Memory

MAX_CHANGES = 16_384
"""Logits of a step that may change before sampling on a device; 256 KiB, moved only in steps that have any."""
STAGES = 2
"""One is packed while the other may still be on its way; likewise results of steps on their way back."""


@dataclass(frozen=True, slots=True)
class DeviceStep:
    """A packed step as operations and sampler read it."""

    inputs: StepInputs
    sampling: SamplingRows
    drawn_from: Tensor
    """[S] 0, or one more than the row of the step before that samples the id of this sequence's decode row"""


@dataclass(slots=True)
class Stage:
    """Pinned memory for one step."""

    packed: Tensor
    """int32"""
    changes: Tensor
    """int32, four equal parts"""
    sent: Event | None = None
    """After its transfers; None while it is free."""


def memory_of(tensor: Tensor) -> Memory:
    """Address and number of elements."""
    assert tensor.is_contiguous(), tensor.stride()
    return tensor.data_ptr(), tensor.numel()


class StepMemory:
    """Room for the largest step."""

    def __init__(self, accelerator: Accelerator, device: torch.device, limits: StepLimits, block_tokens: int) -> None:
        blocks = -(-limits.max_sequence_tokens // block_tokens)
        entries = PackedStep.offsets(limits.max_step_tokens, limits.max_sequences)[-1] + limits.max_sequences * blocks
        self._packed = torch.zeros(entries, dtype=torch.int32, device=device)
        self._changes = torch.zeros(4 * MAX_CHANGES, dtype=torch.int32, device=device)
        # No grammar masks come from the core: no row has one.
        self._no_masks = torch.zeros(0, 1, dtype=torch.int32, device=device)
        self._unmasked = torch.zeros(limits.max_sequences, dtype=torch.int32, device=device)
        self._stages = [
            Stage(accelerator.pinned(entries, torch.int32), accelerator.pinned(4 * MAX_CHANGES, torch.int32))
            for _ in range(STAGES)
        ]
        self._turn = 0

    def stage(self) -> Stage:
        """Free memory to pack a step into; waits for the transfer of the step that had it before the last."""
        self._turn = (self._turn + 1) % STAGES
        stage = self._stages[self._turn]
        if stage.sent is not None:
            stage.sent.wait()
            stage.sent = None
        return stage

    def send(self, stage: Stage, packed: PackedStep, stream: Stream) -> None:
        """Moves a packed step to the device."""
        stream.copy(stage.packed[: packed.entries], self._packed[: packed.entries])
        if packed.changes:
            stream.copy(stage.changes, self._changes)
        stage.sent = stream.record()

    def clear(self, room: tuple[int, int]) -> None:
        """Makes the device's memory a step in which no sequence is there, and samples what is greatest. As work of a
        stream."""
        self._packed[: PackedStep.offsets(*room)[-1]].zero_()
        sampling = self.step(room, room[1], (0, room[1])).sampling
        sampling.top_p.fill_(1.0)
        sampling.repetition_penalty.fill_(1.0)

    def step(self, room: tuple[int, int], samples: int, dealt: tuple[int, int]) -> DeviceStep:
        """A step that was packed for `room`, of which `samples` rows sample and this rank samples those of `dealt`."""
        (rows, sequences), (first, last) = room, dealt
        parts = [self._packed[start:end] for start, end in pairwise(PackedStep.offsets(*room))]
        inputs = StepInputs(
            rows=rows,
            sequences=sequences,
            samples=samples,
            token_ids=parts[0][:rows],
            positions=parts[1][:rows],
            slot_mapping=parts[2][:rows],
            query_start=parts[3][: sequences + 1],
            sequence_lengths=parts[4][:sequences],
            table_offsets=parts[5][:sequences],
            block_tables=self._packed[PackedStep.offsets(*room)[-1] :],
            sample_rows=parts[6][:samples],
        )
        floats = [part[first:last].view(torch.float32) for part in parts[7:13]]
        words = [part[first:last] for part in parts[13:19]]
        tokens, counts, flags, biases = self._changes.view(4, MAX_CHANGES).unbind()
        sampling = SamplingRows(
            temperature=floats[0],
            top_p=floats[1],
            min_p=floats[2],
            repetition_penalty=floats[3],
            presence_penalty=floats[4],
            frequency_penalty=floats[5],
            top_k=words[0],
            choice=words[1],
            position=words[2],
            top_logprobs=words[3],
            seed_low=words[4],
            seed_high=words[5],
            change_start=parts[19][first : last + 1],
            change_token=tokens,
            change_count=counts,
            change_flags=flags,
            change_bias=biases.view(torch.float32),
            allowed=self._no_masks,
            allowed_row=self._unmasked[first:last],
        )
        return DeviceStep(inputs, sampling, parts[20][:sequences])
