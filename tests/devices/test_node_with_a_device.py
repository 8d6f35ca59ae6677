"""Goal: a real node with a worker on a device apart: its scheduler has the blocks that the worker has measured, ids are
those of a CPU worker, and a killed worker is replaced with the same ones.

Method: `llmscale serve` whose workers find the fake device where the CPU would be.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

import tests.fakes
from llmscale import LLM, SamplingParams
from llmscale.worker.device_start import MIN_MARGIN_BYTES
from tests.devices.conftest import SIZES
from tests.e2e.test_worker_death import first_difference, restarts
from tests.fakes.device_worker.sitecustomize import FREE_BYTES
from tests.processes import Server, serving, token_ids, wait_until

FAKES = Path(tests.fakes.__file__).parent
ROOT = FAKES.parents[1]
STREAMS = 4
BLOCK_BYTES = 2 * 6 * 4 * 32 * 32 * 4
BLOCKS = 100


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    folders = (FAKES / "device_worker", FAKES, ROOT / "python", ROOT)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, folders)))
    monkeypatch.setenv(FREE_BYTES, str(MIN_MARGIN_BYTES + (2 << 20) + BLOCKS * BLOCK_BYTES))
    options = ("--dtype", "float32", "--threads", "1", "--max-num-seqs", "8", "--device", "cpu", "--executor", "torch")
    with serving("tiny-chat", *options) as server:
        yield server


def body(seed: int) -> dict[str, object]:
    return {"model": "tiny-chat", "prompt": "Once upon a time", "max_tokens": 200, "ignore_eos": True, "seed": seed}


def test_ids_are_those_of_the_cpu_and_survive_a_killed_worker(server: Server) -> None:
    assert "captured decode steps" in server.log(), "the worker is on a device apart"
    assert server.replicas()[0]["total_blocks"] == BLOCKS
    with ThreadPoolExecutor(STREAMS) as pool:
        undisturbed = list(pool.map(lambda seed: token_ids(server, body(seed)), range(STREAMS)))
        worker = server.worker_pid()
        counts = [0] * STREAMS
        streams = [
            pool.submit(token_ids, server, body(seed), partial(counts.__setitem__, seed)) for seed in range(STREAMS)
        ]
        wait_until(lambda: min(counts) >= 5, 120, "all streams run")
        os.kill(worker, signal.SIGKILL)
        survived = [stream.result() for stream in streams]
    assert [first_difference(*pair) for pair in zip(survived, undisturbed, strict=True)] == [None] * STREAMS
    wait_until(lambda: restarts(server) == 1, 120, "the worker was replaced")
    cpu = LLM("tiny-chat", **{**SIZES, "max_num_seqs": 8}, device="cpu")
    (output,) = cpu.generate("Once upon a time", SamplingParams(max_tokens=200, ignore_eos=True, temperature=0.0))
    said = "".join(token_ids(server, {**body(0), "temperature": 0}))
    # The names of special tokens are in a stream's log probabilities, not in a text.
    assert said.replace("<|endoftext|>", "") == output.outputs[0].text
