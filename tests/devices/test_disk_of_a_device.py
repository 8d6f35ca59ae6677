"""Goal: below the host tier of a device apart lies the disk, and what goes through all three says the same.

Method: an offline worker on the fake device whose KV cache holds two conversations and whose host tier four, with a
folder for the rest; its answers are those of a worker on the CPU that has room for all, in the next process too.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from llmscale import LLM, SamplingParams
from llmscale._core import DiskRegion
from llmscale.worker.device_tier import CopyList, DeviceTier
from tests.devices.conftest import MakeFake
from tests.devices.test_tier_of_a_device import conversation
from tests.fakes.fake_device.machine import Script

CONVERSATIONS = 12
BLOCK_BYTES = 32 * 2 * 6 * 4 * 32 * 4
ASKED = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)


def said(llm: LLM, rounds: int) -> list[tuple[int, ...]]:
    numbers = [number for _ in range(rounds) for number in range(CONVERSATIONS)]
    return [llm.generate([conversation(number)], ASKED)[0].outputs[0].token_ids for number in numbers]


@pytest.fixture(scope="module")
def expected(cpu: LLM) -> list[tuple[int, ...]]:
    return said(cpu, 1)


def squeezed(make_fake: MakeFake, folder: Path) -> LLM:
    return make_fake(
        max_model_len=256,
        kv_cache_bytes=12 * BLOCK_BYTES,
        kv_host_bytes=20 * BLOCK_BYTES,
        kv_disk=folder,
        kv_disk_bytes=200 * BLOCK_BYTES,
    )


@pytest.mark.parametrize(("seed", "lazy"), [(0, True), (1, False)])
def test_conversations_come_back_from_the_disk_and_say_the_same(
    make_fake: MakeFake, script: Script, expected: list[tuple[int, ...]], tmp_path: Path, seed: int, lazy: bool
) -> None:
    script.seed, script.lazy = seed, lazy
    llm = squeezed(make_fake, tmp_path)
    assert said(llm, 3) == 3 * expected
    written, read, bad, failed, _ = llm._replica.disk_blocks()
    assert written > 0
    assert read > 0
    assert (bad, failed) == (0, 0)
    assert script.broken == []
    llm.close()
    again = squeezed(make_fake, tmp_path)
    assert said(again, 1) == expected
    assert again._replica.disk_blocks()[1] > 0, "the next process finds what the last one left"
    again.close()


def test_blocks_have_come_back_when_transfers_begin_that_may_take_their_places(
    make_fake: MakeFake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is read by a thread of the processor, which no event of the device holds up."""
    llm = squeezed(make_fake, tmp_path)
    accelerator = llm._runner.device.accelerator
    waiting: list[int] = []
    copy = DeviceTier.copy

    def watched(tier: DeviceTier, source: CopyList, disk: DiskRegion | None = None, *, has_transfers: bool) -> bool:
        made = copy(tier, source, disk, has_transfers=has_transfers)
        if has_transfers:
            waiting.append(len(accelerator.restore._queue))
        return made

    monkeypatch.setattr(DeviceTier, "copy", watched)
    said(llm, 2)
    assert waiting == [0] * len(waiting)
    assert llm._replica.disk_blocks()[1] > 0, "blocks were read from the disk"
    llm.close()


def test_nothing_waits_for_its_header_when_transfers_begin(
    make_fake: MakeFake, script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A transfer writes blocks that are sealed, and reads into places that nobody seals afterwards."""
    unsealed: list[int] = []
    copy = DeviceTier.copy

    def watched(tier: DeviceTier, source: CopyList, disk: DiskRegion | None = None, *, has_transfers: bool) -> bool:
        made = copy(tier, source, disk, has_transfers=has_transfers)
        if has_transfers:
            unsealed.append(len(tier._unsealed))
        return made

    monkeypatch.setattr(DeviceTier, "copy", watched)
    llm = squeezed(make_fake, tmp_path)
    said(llm, 2)
    assert unsealed == [0] * len(unsealed)
    assert len(unsealed) > CONVERSATIONS
    llm.close()
