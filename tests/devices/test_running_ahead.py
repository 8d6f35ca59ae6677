"""Goal: a device gets its next step before the ids of the last one are read, and nothing that is said changes.

Method: whole models offline on the fake device, with a record of what was launched and read when; the steps that must
wait; and the mistakes that running ahead invites.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from llmscale import LLM, SamplingParams
from llmscale._core import StepCounts
from llmscale.worker.device_steps import DeviceSteps
from tests.devices.conftest import MakeFake
from tests.devices.test_worker_on_a_device import ids
from tests.fakes.fake_device.machine import FakeOutOfMemory, Script
from tests.fakes.fake_device.operations import FakeSampler

GREEDY = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
PROMPT = [[20, 30, 40, 50]]


@pytest.fixture
def happened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every launch of a step and every reading of its results, in their order."""
    log: list[str] = []

    def logged(name: str, method: Callable[..., object]) -> Callable[..., object]:
        def call(steps: DeviceSteps, *arguments: object) -> object:
            log.append(name)
            return method(steps, *arguments)

        return call

    monkeypatch.setattr(DeviceSteps, "_launch", logged("launch", DeviceSteps._launch))
    monkeypatch.setattr(DeviceSteps, "draw", logged("read", DeviceSteps.draw))
    return log


def test_every_decode_is_launched_before_the_step_in_front_of_it_is_read(
    make_fake: MakeFake, happened: list[str]
) -> None:
    make_fake().generate(PROMPT, GREEDY)
    assert happened == ["launch", *["launch", "read"] * 11, "read"]


def test_chunks_of_a_prompt_are_launched_one_behind_the_other(make_fake: MakeFake, happened: list[str]) -> None:
    make_fake().generate([list(range(20, 20 + 3 * 96))], SamplingParams(max_tokens=1))
    assert happened == ["launch", "launch", "read", "launch", "read", "read"]


def test_a_row_whose_penalty_counts_the_awaited_id_waits_for_it(make_fake: MakeFake, happened: list[str]) -> None:
    asked = SamplingParams(max_tokens=6, temperature=0.0, frequency_penalty=0.1, ignore_eos=True)
    make_fake().generate(PROMPT, asked)
    assert happened == ["launch", "read"] * 6


def test_a_step_with_a_new_sequence_waits_so_that_each_death_has_its_suspects(
    make_fake: MakeFake, happened: list[str], cpu: LLM
) -> None:
    """Two run, the third begins when the first has ended: its prompt is launched when nothing else is on its way."""
    asked = [SamplingParams(max_tokens=length, temperature=0.0, ignore_eos=True) for length in (4, 9, 3)]
    prompts = ["one", "two", "three"]
    assert ids(make_fake(max_num_seqs=2), prompts, asked) == ids(cpu, prompts, asked)
    open_steps, waited = 0, 0
    for number, what in enumerate(happened):
        waited += what == "launch" and open_steps == 0 and number > 0
        open_steps += 1 if what == "launch" else -1
        assert open_steps in (0, 1, 2)
    assert waited == 1


@pytest.mark.parametrize("seed", [3, 4])
def test_sequences_that_end_by_what_they_say_end_there_though_a_row_more_was_computed(
    make_fake: MakeFake, cpu: LLM, script: Script, seed: int
) -> None:
    script.seed = seed
    prompts = ["Once upon a time", "What is 23 + 45?", "Sort: 5 2 9 1", "A cat and a dog", "Hello"]
    asked = [SamplingParams(max_tokens=60, seed=number, stop=["a"], logprobs=1) for number in range(5)]
    fake = make_fake()
    for _ in range(2):
        ours, theirs = fake.generate(prompts, asked), cpu.generate(prompts, asked)
        for one, other in zip(ours, theirs, strict=True):
            assert one.outputs[0].token_ids == other.outputs[0].token_ids
            assert one.outputs[0].text == other.outputs[0].text
            assert one.outputs[0].finish_reason == other.outputs[0].finish_reason == "stop"
    fake._replica.check()
    assert fake._replica.is_idle()


def test_a_step_that_finds_no_memory_behind_another_is_computed_when_that_is_read(
    make_fake: MakeFake, script: Script, happened: list[str], cpu: LLM
) -> None:
    llm = make_fake()
    # The third step, first behind the second and then alone: halved.
    script.refused_runs = {2, 3}
    prompts, asked = ["one", "two"], [GREEDY, GREEDY]
    assert ids(llm, prompts, asked) == ids(cpu, prompts, asked)
    assert happened[:8] == ["launch", "launch", "read", "launch", "read", "launch", "launch", "launch"]


def test_results_of_two_steps_that_arrive_in_one_place_are_found(make_fake: MakeFake, script: Script) -> None:
    script.lazy = False
    llm = make_fake()
    stepper = llm._runner._stepper
    assert stepper is not None
    stepper._drawn = stepper._drawn[:1] * 2
    with pytest.raises(BaseException, match="the sampler of the device left status"):
        llm.generate(PROMPT, GREEDY)


def test_ids_that_are_not_handed_on_are_found(make_fake: MakeFake, monkeypatch: pytest.MonkeyPatch, cpu: LLM) -> None:
    monkeypatch.setattr(FakeSampler, "hand_on", lambda sampler, drawn_from, token_ids: None)
    assert ids(make_fake(), PROMPT, [GREEDY]) != ids(cpu, PROMPT, [GREEDY])  # type: ignore[arg-type]  # ids are prompts


def test_a_penalty_that_does_not_wait_is_found(make_fake: MakeFake, cpu: LLM) -> None:
    llm = make_fake()
    llm._steps._source = _Hasty(llm._replica)  # type: ignore[attr-defined]
    asked = [SamplingParams(max_tokens=24, temperature=0.0, repetition_penalty=1.8, ignore_eos=True)]
    assert ids(llm, ["Hello"], asked) != ids(cpu, ["Hello"], asked)


class _Hasty:
    """A source that says of every step that it may run ahead."""

    def __init__(self, source: object) -> None:
        self._source = source

    def __getattr__(self, name: str) -> object:
        return getattr(self._source, name)

    def follows_on(self) -> bool:
        return True


def test_a_processor_that_draws_for_a_step_that_the_mirror_has_left_is_refused(
    make_fake: MakeFake, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = make_fake()
    kernels, words = llm._runner.kernels, llm._words.buffer_info()

    def draw(steps: DeviceSteps, bounds: tuple[int, int], rank: int, into: tuple[int, int]) -> list[int]:
        steps._begun.popleft()
        return llm._replica.draw(kernels, words, "float32", bounds, rank, into)

    monkeypatch.setattr(DeviceSteps, "draw", draw)
    with pytest.raises(Exception, match="one step is drawn for by the processor, and 2 are not answered"):
        llm.generate(PROMPT, GREEDY)


def test_a_step_that_raises_is_named_when_the_one_in_front_of_it_is_answered(
    make_fake: MakeFake, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = make_fake()
    answered: list[int] = []
    answer, compute = llm._answer, DeviceSteps.compute
    llm._queue._answer = lambda counts: (answered.append(counts.rows), answer(counts))[1]
    begun: list[int] = []

    def failing(steps: DeviceSteps, counts: StepCounts) -> bool:
        begun.append(counts.rows)
        if len(begun) == 3:
            raise RuntimeError("the third step")
        return compute(steps, counts)

    monkeypatch.setattr(DeviceSteps, "compute", failing)
    with pytest.raises(RuntimeError, match="the third step"):
        llm.generate(PROMPT, GREEDY)
    assert answered == [4, 1], "the prompt and the first decode; the second decode raised"


def test_nothing_broken_is_left_by_a_step_that_raised_on_the_device(
    make_fake: MakeFake, script: Script, monkeypatch: pytest.MonkeyPatch, cpu: LLM
) -> None:
    """Work that waits in the stream is done before later work, whoever has forgotten it."""
    llm = make_fake()
    with monkeypatch.context() as patch:
        patch.setattr(DeviceSteps, "draw", _raises)
        with pytest.raises(FakeOutOfMemory):
            llm.generate(PROMPT, GREEDY)
    assert ids(llm, ["Hello"], [GREEDY]) == ids(cpu, ["Hello"], [GREEDY])
    assert script.broken == []


def _raises(*_: object) -> list[int]:
    raise FakeOutOfMemory("in the step in front")
