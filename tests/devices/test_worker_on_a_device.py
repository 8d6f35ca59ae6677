"""Goal: a worker on a device apart says what the CPU worker says, whatever its streams do first and whoever asks.

Method: whole models offline on a device that works late, with rules that a real one would not tell of when broken; ids
are compared with those of the CPU worker.
"""

from __future__ import annotations

import pytest

from llmscale import LLM, SamplingParams
from llmscale.errors import OutOfDeviceMemory
from llmscale.worker import device_steps, step_memory
from llmscale.worker.device_steps import graph_sizes
from tests.devices.conftest import MakeFake
from tests.fakes.fake_device.machine import BrokenRule, Script

PROMPTS = ["Once upon a time", "What is 23 + 45?", "Sort: 5 2 9 1", "A cat and a dog", "Hello"]
ASKED = [
    SamplingParams(max_tokens=30, temperature=0.0, ignore_eos=True),
    SamplingParams(max_tokens=24, seed=3, logprobs=5, ignore_eos=True),
    SamplingParams(max_tokens=20, seed=4, top_p=0.8, top_k=30, min_p=0.01, ignore_eos=True),
    SamplingParams(
        max_tokens=22, seed=5, repetition_penalty=1.3, presence_penalty=0.4, frequency_penalty=0.2, ignore_eos=True
    ),
    SamplingParams(max_tokens=12, min_tokens=8, seed=6, temperature=1.4, logit_bias={7: 2.5, 11: -3.0}),
]


def ids(llm: LLM, prompts: list[str] = PROMPTS, asked: list[SamplingParams] = ASKED) -> list[tuple[int, ...]]:
    return [output.outputs[0].token_ids for output in llm.generate(prompts, asked)]


@pytest.fixture(scope="module")
def expected(cpu: LLM) -> list[tuple[int, ...]]:
    return ids(cpu)


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("lazy", [True, False])
def test_ids_are_those_of_the_cpu_whatever_the_streams_do_first(
    make_fake: MakeFake, script: Script, expected: list[tuple[int, ...]], seed: int, lazy: bool
) -> None:
    script.seed, script.lazy = seed, lazy
    assert ids(make_fake()) == expected
    assert script.broken == []


def test_log_probabilities_are_those_of_the_cpu(make_fake: MakeFake, cpu: LLM) -> None:
    asked = SamplingParams(max_tokens=6, seed=1, logprobs=4)
    ours, theirs = (llm.generate(PROMPTS[:2], asked) for llm in (make_fake(), cpu))
    for one, other in zip(ours, theirs, strict=True):
        for row, wanted in zip(one.outputs[0].logprobs or (), other.outputs[0].logprobs or (), strict=True):
            assert [entry.token_id for entry in row] == [entry.token_id for entry in wanted]
            assert [entry.logprob for entry in row] == pytest.approx([entry.logprob for entry in wanted], abs=1e-4)


@pytest.mark.parametrize("batch", range(1, 13))
def test_a_batch_of_any_size_is_decoded_by_the_next_larger_graph(cpu: LLM, batch: int, shared_fake: LLM) -> None:
    prompts = [f"{number} and {number}" for number in range(batch)]
    asked = [SamplingParams(max_tokens=6, seed=number, ignore_eos=True) for number in range(batch)]
    assert ids(shared_fake, prompts, asked) == ids(cpu, prompts, asked)


@pytest.fixture(scope="module")
def shared_fake() -> LLM:
    """One for all sizes: graphs are captured once."""
    with pytest.MonkeyPatch.context() as patch:
        from llmscale.devices import registry
        from tests.devices.conftest import MODEL, SIZES

        patch.setitem(registry.DEVICES, "cpu", "tests.fakes.fake_device.device")
        return LLM(MODEL, **SIZES, device="cpu")


@pytest.mark.parametrize(
    ("most", "graphs", "sizes"),
    [
        (1, 64, [1]),
        (4, 64, [1, 2, 4]),
        (12, 64, [1, 2, 4, 8, 12]),
        (32, 64, [1, 2, 4, 8, 16, 24, 32]),
        (256, 64, [1, 2, 4, *range(8, 257, 8)]),
        (1_024, 64, [1, 2, 4, *range(32, 1_025, 32)]),
        (12, 0, []),
    ],
)
def test_graphs_are_captured_for_few_sizes_and_the_largest(most: int, graphs: int, sizes: list[int]) -> None:
    assert graph_sizes(most, graphs) == sizes


def test_without_graphs_every_step_runs_eagerly(
    make_fake: MakeFake, script: Script, expected: list[tuple[int, ...]]
) -> None:
    script.max_graphs = 0
    assert ids(make_fake()) == expected


def test_rows_that_the_device_cannot_sample_are_sampled_on_the_processor(
    make_fake: MakeFake, monkeypatch: pytest.MonkeyPatch, expected: list[tuple[int, ...]]
) -> None:
    drawn_here: list[int] = []
    forward = device_steps.DeviceStepper.forward_for_host

    def counted(stepper: device_steps.DeviceStepper, step: step_memory.DeviceStep, rows: int) -> object:
        drawn_here.append(rows)
        return forward(stepper, step, rows)

    monkeypatch.setattr(step_memory, "MAX_CHANGES", 16)
    monkeypatch.setattr(device_steps.DeviceStepper, "forward_for_host", counted)
    assert ids(make_fake()) == expected
    assert drawn_here, "the penalties of these requests do not fit 16 changes"


def test_every_step_may_find_no_memory_once(
    make_fake: MakeFake, script: Script, expected: list[tuple[int, ...]]
) -> None:
    llm = make_fake()
    ids(llm)
    runs = script.runs
    assert runs > 20, "prefills and decodes"
    for refused in range(runs):
        script.runs, script.refused_runs = 0, {refused}
        assert ids(llm) == expected, f"run {refused} of {runs} found no memory"
    assert script.empties >= runs


def test_a_step_that_finds_no_memory_again_and_again_is_cut_until_it_does(
    make_fake: MakeFake, script: Script, expected: list[tuple[int, ...]]
) -> None:
    llm = make_fake()
    # 40 rows of prompts, halved four times: to two and three rows.
    script.refused_runs = {0, 1, 2, 3}
    assert ids(llm) == expected
    assert script.empties >= 4


def test_a_half_that_is_all_chunk_is_computed_as_one_though_the_step_has_as_many_sequences(
    make_fake: MakeFake, script: Script, cpu: LLM
) -> None:
    """Eight decodes and the last eight rows of a prompt: the second half is one sequence of as many rows."""
    prompts = [[20 + number, 30, 40] for number in range(8)] + [list(range(20, 20 + 96 - 8 * 3 + 8))]
    asked = [SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)] * 9
    llm = make_fake()
    # First behind the step before, then alone.
    script.refused_runs = {1, 2}
    assert ids(llm, prompts, asked) == ids(cpu, prompts, asked)  # type: ignore[arg-type]  # ids are prompts
    assert script.broken == []
    assert script.empties > 0


def test_a_worker_that_cannot_run_a_single_row_says_so(make_fake: MakeFake, script: Script) -> None:
    llm = make_fake()
    script.refused_runs = set(range(10_000))
    with pytest.raises(OutOfDeviceMemory, match=r"a step of 1 rows finds no memory.*--kv-cache-bytes"):
        ids(llm)
    script.runs, script.refused_runs = 0, set()
    assert len(ids(llm)) == len(PROMPTS), "it goes on when there is memory again"


def test_a_staging_buffer_that_is_packed_again_before_its_transfer_is_found(
    make_fake: MakeFake, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = make_fake()

    def careless(memory: step_memory.StepMemory) -> step_memory.Stage:
        return memory._stages[0]

    monkeypatch.setattr(step_memory.StepMemory, "stage", careless)
    # A prompt in many chunks: steps that sample nothing are not waited for.
    with pytest.raises(BrokenRule, match="written before its transfer"):
        llm.generate([[5] * 900], SamplingParams(max_tokens=2))


def test_steps_that_sample_nothing_are_not_waited_for_and_go_on_rightly(make_fake: MakeFake, cpu: LLM) -> None:
    prompt, asked = [list(range(20, 900))], SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
    ours, theirs = (llm.generate(prompt, asked)[0].outputs[0].token_ids for llm in (make_fake(), cpu))
    assert ours == theirs


def test_results_that_are_read_before_they_arrive_are_found(
    make_fake: MakeFake, monkeypatch: pytest.MonkeyPatch, expected: list[tuple[int, ...]]
) -> None:
    llm = make_fake()
    launch = device_steps.DeviceSteps._launch

    def careless(steps: device_steps.DeviceSteps, *arguments: object) -> object:
        part = launch(steps, *arguments)  # type: ignore[arg-type]
        part.arrived = None
        return part

    monkeypatch.setattr(device_steps.DeviceSteps, "_launch", careless)
    with pytest.raises(BaseException, match="the sampler of the device left status"):
        ids(llm)


def test_a_graph_that_is_too_small_is_refused_by_the_core(make_fake: MakeFake, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = make_fake()
    monkeypatch.setattr(device_steps.DeviceStepper, "graph_for", lambda stepper, rows: 1)
    with pytest.raises(Exception, match="rows are to be packed, there is room for 1"):
        ids(llm)


def test_a_graph_whose_memory_has_moved_is_found(make_fake: MakeFake) -> None:
    llm = make_fake()
    stepper = llm._runner._stepper
    assert stepper is not None
    sampler = stepper.sampler
    assert sampler is not None
    sampler.drawn = sampler.drawn.clone()
    with pytest.raises(BrokenRule, match="has moved"):
        ids(llm)
