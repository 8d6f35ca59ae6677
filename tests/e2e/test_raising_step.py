"""Goal: a step that raises ends the one request that made it raise; its neighbours go on, and so does the worker.

Method: a real server whose worker has a planted bug; ids of the neighbours are compared with an undisturbed run.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import tests.fakes
from tests.e2e.test_worker_death import first_difference, restarts
from tests.fakes.raising_worker.sitecustomize import DEADLY_ID
from tests.processes import serving, stopped, token_ids, wait_until

NEIGHBOURS = 4
FAKES = Path(tests.fakes.__file__).parent
ROOT = FAKES.parents[1]


def body(seed: int) -> dict[str, object]:
    bias = {str(DEADLY_ID): -100}
    return {
        "model": "tiny-chat",
        "prompt": "Once upon a time",
        "max_tokens": 1_000,
        "ignore_eos": True,
        "seed": seed,
        "logit_bias": bias,
    }


def test_a_step_that_raises_ends_the_request_that_it_raised_for(monkeypatch: pytest.MonkeyPatch) -> None:
    folders = (FAKES / "raising_worker", FAKES, ROOT / "python", ROOT)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, folders)))
    with (
        serving("tiny-chat", "--dtype", "float32", "--threads", "1") as server,
        ThreadPoolExecutor(NEIGHBOURS + 1) as pool,
    ):
        undisturbed = [token_ids(server, body(seed)) for seed in range(NEIGHBOURS)]
        worker = server.worker_pid()
        deadly = {"model": "tiny-chat", "prompt": [20, DEADLY_ID, 30], "max_tokens": 4}
        with stopped(worker):
            streams = [pool.submit(token_ids, server, body(seed)) for seed in range(NEIGHBOURS)]
            wait_until(lambda: server.held() == NEIGHBOURS, 120, "the neighbours are there")
            last = pool.submit(server.post, "/v1/completions", deadly)
            wait_until(lambda: server.held() == NEIGHBOURS + 1, 120, "so is the deadly one")
        answer = last.result()
        assert answer.status_code == 500, answer.text
        assert answer.json()["error"]["code"] == "request_poisoned"
        survived = [stream.result() for stream in streams]
        assert [first_difference(*pair) for pair in zip(survived, undisturbed, strict=True)] == [None] * NEIGHBOURS
        assert server.worker_pid() == worker, "the worker that raised goes on"
        assert restarts(server) == 0
        assert f"a bug that the id {DEADLY_ID} meets" in server.log()
