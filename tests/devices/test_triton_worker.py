"""Goal: the worker of CUDA devices, with Triton's operations and sampler in captured steps, says what the CPU says.

Method: a process of its own, in which Triton's interpreter runs the kernels on the fake device; few tokens, it is slow.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="Triton comes with torch's CUDA wheels for Linux")


def test_the_kernels_of_a_gpu_give_the_ids_of_the_cpu() -> None:
    command = [sys.executable, "-m", "tests.devices.triton_worker"]
    done = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2_000:]
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["triton"] == said["cpu"]
    assert [len(ids) for ids in said["cpu"]] == [3, 3]
    assert said["broken"] == []
