"""Goal: blocks go to the host and come back on streams of their own, and a sequence never reads what is not there yet.

Method: an offline worker on the fake device with a KV cache too small for its conversations, so that they are copied
out and back, compared with a worker on the CPU that has room for all; then the mistakes that such copies invite.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from llmscale import LLM, SamplingParams
from llmscale.worker.device_tier import MAX_CALIBRATION_NS, Copy, DeviceTier
from tests.devices.conftest import MakeFake
from tests.fakes.fake_device.device import FakeAccelerator
from tests.fakes.fake_device.machine import BrokenRule, FakeEvent, FakeStream, Script

TURNS = 5
ASKED = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)


def conversation(number: int) -> list[int]:
    return [20 + (number * 37 + position * 11) % 400 for position in range(150)]


def said(llm: LLM) -> list[tuple[int, ...]]:
    """What the conversations say when each comes back after the others have taken its place, twice."""
    return [
        llm.generate([conversation(number)], ASKED)[0].outputs[0].token_ids for _ in range(2) for number in range(TURNS)
    ]


@pytest.fixture(scope="module")
def expected(cpu: LLM) -> list[tuple[int, ...]]:
    return said(cpu)


def squeezed(make_fake: MakeFake) -> LLM:
    """Room for two conversations on the device and for all on the host."""
    block_bytes = 32 * 2 * 6 * 4 * 32 * 4
    return make_fake(max_model_len=256, kv_cache_bytes=12 * block_bytes, kv_host_bytes=64 * block_bytes)


def counters(llm: LLM) -> tuple[int, int, int]:
    """(offloaded, restored, bad) blocks."""
    _, offloaded, restored, bad = llm._replica.copied_blocks()
    return offloaded, restored, bad


@pytest.mark.parametrize(("seed", "favourite"), [(0, 0), (1, 1), (2, 2), (3, 0)])
@pytest.mark.parametrize("lazy", [True, False])
def test_conversations_come_back_from_the_host_and_say_the_same(
    make_fake: MakeFake, script: Script, expected: list[tuple[int, ...]], seed: int, favourite: int, lazy: bool
) -> None:
    script.seed, script.lazy, script.favourite = seed, lazy, favourite
    llm = squeezed(make_fake)
    assert said(llm) == expected
    offloaded, restored, bad = counters(llm)
    assert offloaded > 0
    assert restored > 0
    assert bad == 0
    assert script.broken == []


@pytest.mark.parametrize("lazy", [True, False])
def test_a_step_that_evicts_more_blocks_than_the_host_has_places_leaves_the_last_there(
    make_fake: MakeFake, script: Script, expected: list[tuple[int, ...]], lazy: bool
) -> None:
    script.lazy = lazy
    block_bytes = 32 * 2 * 6 * 4 * 32 * 4
    llm = make_fake(max_model_len=256, kv_cache_bytes=12 * block_bytes, kv_host_bytes=2 * block_bytes)
    assert said(llm) == expected
    # Of the one evicted last the beginning left last, for a place that a later part of it was to have in the same step.
    number = TURNS - 3
    assert llm.generate([conversation(number)], ASKED)[0].outputs[0].token_ids == expected[number]
    offloaded, restored, bad = counters(llm)
    assert offloaded > TURNS
    assert restored == 1
    assert bad == 0
    assert script.broken == []


def test_copies_are_calibrated_once_with_memory_of_their_own(make_fake: MakeFake, script: Script) -> None:
    block_bytes = 32 * 2 * 6 * 4 * 32 * 4
    llm = squeezed(make_fake)
    assert script.calibrated == [(block_bytes, MAX_CALIBRATION_NS)]
    said(llm)
    assert len(script.calibrated) == 1


def test_what_rests_is_sealed_without_another_step(make_fake: MakeFake) -> None:
    llm = squeezed(make_fake)
    said(llm)
    assert llm._runner.host is not None
    tier = llm._runner.host._apart
    assert tier is not None
    llm._runner.device.accelerator.empty_cache()  # type: ignore[union-attr]
    llm._runner.rest()
    assert tier._unsealed == []


def differs(llm: LLM, expected: Sequence[tuple[int, ...]], script: Script) -> bool:
    """Whether a mistake shows: in what is said, in a broken rule, or in blocks that do not hold what they should."""
    try:
        ids = said(llm)
    except BrokenRule:
        return True
    return ids != expected or counters(llm)[2] > 0 or script.broken != []


def test_steps_that_do_not_wait_for_their_restored_blocks_are_found(
    make_fake: MakeFake, script: Script, expected: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = squeezed(make_fake)
    compute = llm._runner.device.accelerator.compute  # type: ignore[union-attr]
    monkeypatch.setattr(compute, "wait_for", lambda event: None)
    assert differs(llm, expected, script)


def test_blocks_that_come_back_to_a_place_before_its_content_has_left_are_found(
    make_fake: MakeFake, script: Script, expected: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    script.favourite = 2
    llm = squeezed(make_fake)
    monkeypatch.setattr(llm._runner.device.accelerator.restore, "wait_for", lambda event: None)  # type: ignore[union-attr]
    assert differs(llm, expected, script)


def test_a_header_that_is_written_before_its_copy_has_ended_is_found(
    make_fake: MakeFake, script: Script, expected: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    offload = DeviceTier._offload

    def hasty(tier: DeviceTier, run: Sequence[Copy], after: FakeEvent) -> object:
        ended = offload(tier, run, after)
        for _, _, host, tag in run:
            tier._host.seal(host, tag)
        tier._unsealed.clear()
        return ended

    monkeypatch.setattr(DeviceTier, "_offload", hasty)
    assert differs(squeezed(make_fake), expected, script)


def test_a_block_that_is_wanted_back_at_once_is_waited_for(make_fake: MakeFake, script: Script) -> None:
    """Also if nobody has looked at its event yet: streams of a lazy device go on only for who waits."""
    llm = squeezed(make_fake)
    waited: list[int] = []
    seal = DeviceTier._seal_oldest

    def counted(tier: DeviceTier) -> None:
        waited.append(1)
        seal(tier)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DeviceTier, "_seal_oldest", counted)
        said(llm)
    assert waited
    assert counters(llm)[2] == 0


def test_blocks_are_copied_by_registered_memory_alone(script: Script) -> None:
    accelerator = FakeAccelerator(script)
    stream: FakeStream = accelerator.offload
    with pytest.raises(BrokenRule, match="of these two one is not"):
        stream.copy_blocks(torch.zeros(2, 16), torch.zeros(2, 16), [(0, 1)])
