"""Block copies on the emulation: both kernels, packing against torch bit for bit, and what is next to a block."""

from __future__ import annotations

import pytest
import torch

from llmscale.cuda.kv_blocks import (
    BlockList,
    PackedLayout,
    launch_copy,
    launch_pack,
    launch_unpack,
    packed_blocks,
    unpacked_blocks,
)
from tests.cuda.emulator import ADA, HOPPER, SEEDS, Emulator

CPU = torch.device("cpu")
SOURCES = [5, 0, 11, 3, 8, 9, 1]
TARGETS = [2, 9, 0, 7, 5, 6, 12]


def listed(source: torch.Tensor, target: torch.Tensor, sources=SOURCES, targets=TARGETS) -> BlockList:
    return BlockList.of(sources, targets, source, target, CPU)


@pytest.mark.parametrize("limits", [HOPPER, ADA], ids=["bulk", "loads"])
@pytest.mark.parametrize("size", [16, 4_096, 16_384, 40_976, 400_000])
@pytest.mark.parametrize("seed", SEEDS)
def test_blocks_arrive_and_their_neighbours_stay(limits, size: int, seed: int) -> None:
    source = torch.randint(0, 255, (12, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(size))
    target = torch.full((13, size), 0xEE, dtype=torch.uint8)
    expected = target.clone()
    expected[TARGETS] = source[SOURCES]
    emulator = Emulator(seed, limits)
    launch_copy(emulator, source, target, listed(source, target), thread_blocks=3)
    assert emulator.launches[0].kernel == ("kv_copy_bulk" if limits is HOPPER else "kv_copy_loads")
    assert torch.equal(target, expected)


def test_no_blocks_are_no_launch() -> None:
    region = torch.zeros(3, 16, dtype=torch.uint8)
    emulator = Emulator()
    launch_copy(emulator, region, region.clone(), listed(region, region, [], []))
    assert emulator.launches == []


@pytest.mark.parametrize(
    ("sources", "targets", "words"),
    [
        ([12], [0], "source block"),
        ([0], [13], "target block"),
        ([-1], [0], "source block"),
        ([0, 1], [4, 4], "two copies"),
    ],
)
def test_a_block_list_outside_of_its_regions_is_refused(sources: list[int], targets: list[int], words: str) -> None:
    source, target = torch.zeros(12, 16), torch.zeros(13, 16)
    with pytest.raises(AssertionError, match=words):
        listed(source, target, sources, targets)


def kv_region(blocks: int, layers: int, heads: int, tokens: int, dimensions: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(dimensions)
    shape = (blocks, layers, 2, heads, tokens, dimensions)
    # Magnitudes over 20 binary orders, so that every part of e4m3 is met, subnormals included.
    spread = torch.exp2(torch.rand(shape, generator=generator) * 20 - 12)
    return (torch.randn(shape, generator=generator) * spread).bfloat16()


@pytest.mark.parametrize(("layers", "heads", "tokens", "dimensions"), [(1, 1, 1, 16), (2, 3, 32, 64), (1, 2, 32, 80)])
@pytest.mark.parametrize("seed", SEEDS)
def test_packed_blocks_are_torchs_bit_for_bit(layers: int, heads: int, tokens: int, dimensions: int, seed: int) -> None:
    region = kv_region(12, layers, heads, tokens, dimensions)
    region[5, 0, 0, 0] = 0.0
    layout = PackedLayout.of(region)
    packed = torch.full((13, layout.packed_block_bytes), 0xEE, dtype=torch.uint8)
    launch_pack(Emulator(seed), region, packed, listed(region, packed), layout)
    used = layout.slabs * (layout.slab_elements + 4)
    assert torch.equal(packed[TARGETS, :used], packed_blocks(region[SOURCES], layout)[:, :used])
    assert (packed[[1, 3, 4]] == 0xEE).all()

    back = torch.full_like(region, float("nan"))
    launch_unpack(Emulator(seed), packed, back, BlockList.of(TARGETS, SOURCES, packed, back, CPU), layout)
    expected = unpacked_blocks(packed[TARGETS], layout).view(region[SOURCES].shape)
    assert torch.equal(back[SOURCES], expected)
    # An element's error is half a step of e4m3 (2^-4 of it, or the slab's smallest step), and bfloat16's rounding.
    largest = region[SOURCES].double().abs().amax((-1, -2), keepdim=True)
    bound = region[SOURCES].double().abs() * (2**-4 + 2**-8) + largest / 448 * 2**-10 * 1.01
    assert ((back[SOURCES].double() - region[SOURCES].double()).abs() <= bound).all()


def test_every_bfloat16_is_rounded_as_torch_rounds_it() -> None:
    # 1.0 per slab is not possible: the scale is the slab's own. 448 in each slab makes it 1.
    bits = torch.arange(0, 1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    usable = bits[(bits.abs() <= 448) | bits.isnan()]
    rows = torch.nn.functional.pad(usable, (0, -usable.numel() % 1_023)).view(-1, 1_023)
    region = torch.nn.functional.pad(rows, (1, 0), value=448.0).view(1, rows.shape[0], 1, 1, 32, 32).contiguous()
    region = torch.cat((region, region), dim=2).contiguous()
    layout = PackedLayout.of(region)
    packed = torch.zeros(1, layout.packed_block_bytes, dtype=torch.uint8)
    launch_pack(Emulator(), region, packed, listed(region, packed, [0], [0]), layout)
    expected = packed_blocks(region, layout)
    is_nan = (expected & 0x7F) == 0x7F
    assert torch.equal(is_nan, (packed & 0x7F) == 0x7F)
    assert torch.equal(packed[~is_nan], expected[~is_nan])


def test_a_nan_in_the_cache_is_a_nan_after_packing() -> None:
    region = kv_region(1, 1, 1, 4, 16)
    region[0, 0, 0, 0, 1, 3] = float("nan")
    layout = PackedLayout.of(region)
    packed = torch.zeros(1, layout.packed_block_bytes, dtype=torch.uint8)
    back = torch.zeros_like(region)
    blocks = listed(region, packed, [0], [0])
    launch_pack(Emulator(), region, packed, blocks, layout)
    launch_unpack(Emulator(), packed, back, blocks, layout)
    assert torch.equal(back.isnan(), region.isnan())
