"""KV blocks between pinned memory and a device: engine and kernel over block sizes, and what a copy costs a product.

Blocks are scattered on both sides, as a cache's are. Rates stand against the link's measured rate in that direction.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import torch

from bench.gpu_timing import (
    DEVICE,
    Budget,
    Stream,
    elapsed_microseconds,
    inverted,
    new_stream,
    on_stream,
    pinned,
    stream_microseconds,
    synchronize,
)
from bench.result import Row
from bench.statistics import spread
from llmscale.cuda.block_copier import BlockCopier, Regions
from llmscale.cuda.copy_choice import CopyCost, CopyCosts, CopyMethod
from llmscale.cuda.device import CudaDevice, cuda_device
from llmscale.cuda.kv_blocks import BlockList, PackedLayout, launch_copy, launch_pack, launch_unpack
from llmscale.cuda.kv_blocks import packed_blocks as expected_packing

BLOCK_BYTES = (8 << 10, 32 << 10, 128 << 10, 512 << 10, 2 << 20)
REGION_BYTES = 512 << 20
MAX_BLOCKS = 4_096
SIDE = 8_192
NEVER = CopyCost(1 << 60, 0, 0)
FREE = CopyCost(0, 0, 0)


def copy_rates(budget: Budget, limits: dict[str, float]) -> Iterator[Row]:
    """Every block size, direction and method."""
    device = cuda_device(0)
    stream = new_stream()
    host = pinned(REGION_BYTES).random_()
    there = torch.empty(REGION_BYTES, dtype=torch.uint8, device=DEVICE)
    generator = random.Random(0)
    for size in BLOCK_BYTES:
        blocks = REGION_BYTES // size
        count = min(MAX_BLOCKS, blocks // 2)
        sources, targets = (generator.sample(range(blocks), count) for _ in range(2))
        shaped = (host.view(blocks, size), there.view(blocks, size))
        for direction, regions in (("host_to_device", Regions(*shaped)), ("device_to_host", Regions(*shaped[::-1]))):
            limit = limits.get(f"{direction}_gigabytes_per_second")
            for name, start in _ways(device, regions, sources, targets):
                if not budget.allows():
                    continue
                measured = stream_microseconds(start, stream)
                assert torch.equal(regions.target[targets[-1]].cpu(), regions.source[sources[-1]].cpu()), name
                row = Row.of(
                    f"copy/{direction}/{size >> 10}KiB/{name}",
                    "GB/s",
                    inverted(measured, count * size / 1e3),
                    limit=limit,
                )
                yield row
                if size in {32 << 10, 2 << 20}:
                    yield slowdown(f"copy/{direction}/{size >> 10}KiB/{name}/slowdown", start, stream)


def _ways(
    device: CudaDevice, regions: Regions, sources: list[int], targets: list[int]
) -> Iterator[tuple[str, Callable[[], object]]]:
    here = DEVICE
    engine = BlockCopier(device, here, CopyCosts(FREE, NEVER))
    yield "engine", lambda: engine.copy(regions, sources, targets)
    blocks = BlockList.of(sources, targets, regions.source, regions.target, here)
    for width in (2, 4, 8):
        yield f"kernel{width}", lambda width=width: launch_copy(device, regions.source, regions.target, blocks, width)


def slowdown(case: str, start: Callable[[], object], stream: Stream) -> Row:
    """How much longer twenty products take while copies run beside them, in percent."""
    left = torch.randn(SIDE // 2, SIDE, device=DEVICE).bfloat16()
    right = torch.randn(SIDE, SIDE, device=DEVICE).bfloat16()

    def multiply() -> None:
        for _ in range(20):
            left @ right

    products = new_stream()
    percents = []
    for _ in range(3):
        with on_stream(products):
            alone = elapsed_microseconds(multiply, products)
        with on_stream(stream):
            for _ in range(3):
                start()
        with on_stream(products):
            percents.append(100 * (elapsed_microseconds(multiply, products) / alone - 1))
        synchronize()
    return Row.of(case, "% slower", spread(percents))


def calibration(budget: Budget) -> Iterator[Row]:
    """The costs that a worker would choose by, in both directions, and the choice for 64 scattered blocks of 64 KiB."""
    device = cuda_device(0)
    stream = new_stream()
    shape = (256, 64 << 10)
    host = pinned(*shape).random_()
    there = torch.empty(shape, dtype=torch.uint8, device=DEVICE).random_()

    def elapsed_ns(start: Callable[[], None]) -> int:
        return int(stream_microseconds(start, stream, 1).median * 1e3)

    for direction, regions in (("host_to_device", Regions(host, there)), ("device_to_host", Regions(there, host))):
        if not budget.allows():
            continue
        with on_stream(stream):
            costs = BlockCopier(device, DEVICE).calibrate(regions, elapsed_ns)
        for method, cost in ((CopyMethod.ENGINE, costs.engine), (CopyMethod.KERNEL, costs.kernel)):
            predicted = cost.predicted_ns(64, 64 * shape[1]) / 1e3
            chosen = "yes" if costs.choose(64, 64 * shape[1]) is method else "no"
            peers: dict[str, float | str] = {
                "ns per run": cost.run_ns,
                "ns per MiB": cost.mebibyte_ns,
                "chosen": chosen,
            }
            yield Row(f"calibration/{direction}/{method.value}", predicted, "us", predicted, predicted, 1, None, peers)


def packing_rates(budget: Budget, limits: dict[str, float]) -> Iterator[Row]:
    """Packing to e4m3 and back on the device: bytes of bfloat16 blocks per second."""
    device = cuda_device(0)
    region = torch.randn(64, 32, 2, 8, 32, 128, device=DEVICE).bfloat16()
    layout = PackedLayout.of(region)
    packed = torch.zeros(64, layout.packed_block_bytes, dtype=torch.uint8, device=DEVICE)
    order = list(range(64))
    blocks = BlockList.of(order, order[::-1], region, packed, DEVICE)
    back = torch.empty_like(region)
    stream = new_stream()
    ways: tuple[tuple[str, Callable[[], object]], ...] = (
        ("pack", lambda: launch_pack(device, region, packed, blocks, layout)),
        ("unpack", lambda: launch_unpack(device, packed, back, blocks, layout)),
    )
    for name, start in ways:
        if not budget.allows():
            continue
        measured = stream_microseconds(start, stream)
        rate = inverted(measured, region.numel() * 2 / 1e3)
        yield Row.of(f"kv/{name}", "GB/s", rate, limit=limits.get("copy_gigabytes_per_second"))
    synchronize()
    assert torch.equal(packed.flip(0), expected_packing(region, layout)), "packing differs from torch's"
