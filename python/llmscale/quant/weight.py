"""A quantized weight as methods and kernels take it, whatever the checkpoint's layout was: codes, scales, zero points.

Scales belong to an output feature and a group of consecutive input features, so that parts of a fused weight stack
along the outputs. A group that a rank's cut divides becomes smaller groups with the same scale. Cutting and stacking
are linear in what is held. It does not know checkpoints, or how a product is computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import gcd

import torch
from torch import Tensor

from llmscale.errors import UnsupportedModel


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """A weight `[N, K]`: element `(code - zero) * scale` of its output and its group of `group_size` inputs.

    `codes` [N, K] int8 or float8_e4m3fn, or [N, K / 2] uint8 with two 4-bit codes per byte, the even input in the low
    half. `scales` [N, ceil(K / group_size)] float32. `zeros` uint8 of the same shape, or none: 8 for 4-bit codes, 0 for
    others. `order` [K] int64: input i of the codes is input `order[i]` of the product; none for the natural order.
    """

    codes: Tensor
    scales: Tensor
    group_size: int
    zeros: Tensor | None = None
    order: Tensor | None = None

    @property
    def outputs(self) -> int:
        return self.codes.shape[0]

    @property
    def total_bytes(self) -> int:
        """Bytes of all its tensors."""
        tensors = (self.codes, self.scales, self.zeros, self.order)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def stacked(parts: Sequence[QuantizedWeight], name: str) -> QuantizedWeight:
    """The parts of a fused weight along the outputs. Raises UnsupportedModel if they order their inputs differently."""
    if len(parts) == 1:
        return parts[0]
    group_size = gcd(*(part.group_size for part in parts))
    parts = [with_groups(part, group_size) for part in parts]
    order = parts[0].order
    for part in parts:
        if (part.order is None) != (order is None) or (
            part.order is not None and order is not None and not torch.equal(part.order, order)
        ):
            raise UnsupportedModel(
                f"The parts of {name!r} order their input features differently (g_idx), and they are one product here. "
                "Quantize the model again without act-order, or with one order for all projections of an input."
            )
    zeros = [part.zeros for part in parts if part.zeros is not None]
    return QuantizedWeight(
        codes=torch.cat([part.codes for part in parts]),
        scales=torch.cat([part.scales for part in parts]),
        group_size=group_size,
        zeros=torch.cat(zeros) if zeros else None,
        order=order,
    )


def with_groups(weight: QuantizedWeight, group_size: int) -> QuantizedWeight:
    """The same weight with groups of a size that divides its own: every scale is repeated."""
    if group_size == weight.group_size:
        return weight
    assert weight.group_size % group_size == 0, (weight.group_size, group_size)
    times = weight.group_size // group_size
    return replace(
        weight,
        scales=weight.scales.repeat_interleave(times, dim=1),
        zeros=None if weight.zeros is None else weight.zeros.repeat_interleave(times, dim=1),
        group_size=group_size,
    )


def trimmed_groups(scales: Tensor, inputs: tuple[int, int], group_size: int) -> tuple[Tensor, int]:
    """Scales [N, groups that `inputs` touches], cut to these inputs: the new scales and the size of their groups.

    Where the cut divides a group, groups shrink to the greatest common divisor of the size and both ends.
    """
    start, stop = inputs
    first = start // group_size * group_size
    size = gcd(group_size, start, stop) if start % group_size != 0 else group_size
    times = group_size // size
    wanted = slice((start - first) // size, -(-(stop - first) // size))
    return (scales if times == 1 else scales.repeat_interleave(times, dim=1))[:, wanted], size


def packed_nibbles(codes: Tensor) -> Tensor:
    """uint8 codes [N, K] below 16 as [N, K / 2], the even one of each pair in the low half. K is even."""
    return codes[:, 0::2] | (codes[:, 1::2] << 4)


def unpacked_nibbles(packed: Tensor) -> Tensor:
    """The inverse of `packed_nibbles`."""
    return torch.stack((packed & 15, packed >> 4), dim=2).flatten(1)


def as_words(packed: Tensor) -> Tensor:
    """Bytes [R, 4 C] as little-endian int32 [R, C], the order of memory wherever torch runs."""
    # Flat, because a tensor with an axis of one entry counts as contiguous with any stride there.
    return packed.flatten().view(torch.int32).view(packed.shape[0], -1)


def as_bytes(words: Tensor) -> Tensor:
    """The inverse of `as_words`."""
    return words.flatten().view(torch.uint8).view(words.shape[0], -1)


def expanded(values: Tensor, group_size: int, inputs: int) -> Tensor:
    """Values by group, [N, G], for every input: [N, inputs]."""
    if group_size >= inputs:
        return values[:, :1].expand(-1, inputs)
    return values.repeat_interleave(group_size, dim=1)[:, :inputs]
