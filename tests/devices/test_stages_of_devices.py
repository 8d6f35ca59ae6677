"""Goal: stages of a pipeline on devices apart say what one CPU worker says, for sequence after sequence.

Method: `llmscale serve` with two stages, whose workers find a fake device each where the CPU would be; and one stage in
this process.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import tests.fakes
from llmscale import LLM, SamplingParams
from llmscale.devices import registry
from llmscale.errors import OutOfDeviceMemory
from llmscale.models.locate import locate_model
from llmscale.models.shard import RankPlace
from llmscale.node.rank_meeting import RankMeeting
from llmscale.parallel.layout import HostLayout
from llmscale.worker.model_runner import ModelRunner
from llmscale.worker.runner import RunnerOptions
from llmscale.worker.step_queue import StepQueue
from tests.devices.conftest import SIZES, MakeFake
from tests.fakes.device_worker.sitecustomize import FREE_BYTES, PROMPT
from tests.fakes.fake_device.machine import Script
from tests.processes import Server, serving

FAKES = Path(tests.fakes.__file__).parent
ROOT = FAKES.parents[1]
STREAMS = 3


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    folders = (FAKES / "device_worker", FAKES, ROOT / "python", ROOT)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, folders)))
    monkeypatch.setenv(FREE_BYTES, str(1 << 30))
    monkeypatch.setenv(PROMPT, "1")
    options = ("--dtype", "float32", "--threads", "1", "--max-num-seqs", "8", "--device", "cpu", "--executor", "torch")
    with serving("tiny-chat", *options, "-pp", "2") as server:
        yield server


def test_stages_compute_one_sequence_after_the_other_and_several_at_once(server: Server) -> None:
    """The stage that does not draw has nothing that tells it of a step's end but the step itself."""
    prompts = ["Once upon a time", "What is 23 + 45?", "Hello"]

    def said(prompt: str) -> str:
        body = {"model": "tiny-chat", "prompt": prompt, "max_tokens": 20, "ignore_eos": True, "temperature": 0}
        return server.post("/v1/completions", body).json()["choices"][0]["text"]

    one_by_one = [said(prompt) for prompt in prompts]
    with ThreadPoolExecutor(STREAMS) as pool:
        at_once = list(pool.map(said, prompts))
    cpu = LLM("tiny-chat", **SIZES, device="cpu")
    asked = SamplingParams(max_tokens=20, ignore_eos=True, temperature=0.0)
    expected = [output.outputs[0].text for output in cpu.generate(prompts, asked)]
    assert one_by_one == at_once == expected
    assert server.log().count("KV cache") == 2, "both workers are on devices apart"


def test_a_step_of_a_stage_that_finds_no_memory_is_not_cut_because_the_next_stage_waits_for_all_of_it(
    make_fake: MakeFake, script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = make_fake()
    place, layout = RankPlace(0, 1, 0, 2), HostLayout(1, 2)
    # A graph would hold what is sent.
    script.max_graphs = 0
    monkeypatch.setitem(registry.DEVICES, "cpu", "tests.fakes.fake_device.device")
    with RankMeeting(layout) as meeting:
        options = RunnerOptions(dtype="float32", threads=1, place=place, meeting=meeting.of(place))
        stage = ModelRunner(locate_model("tiny-chat"), llm._limits, options)
    llm._steps = stage.steps(llm._replica)
    llm._queue = StepQueue(stage, llm._steps, llm._replica, llm._answer)
    script.runs, script.refused_runs = 0, {0}
    with pytest.raises(OutOfDeviceMemory, match="a step of 4 rows finds no memory"):
        llm.generate([[20, 30, 40, 50]], SamplingParams(max_tokens=2))
