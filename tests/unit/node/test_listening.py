"""What a node says when it listens: which executor it will compute with, and why."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


def first_words(folder: Path, *options: str) -> dict[str, Any]:
    """Of a node that is ended as soon as it has spoken."""
    listen = f"ipc://{folder}/node"
    words = ["--model", "tiny-chat-mini", "--listen", listen, "--device", "cpu", "--no-spare-worker", *options]
    command = [sys.executable, "-m", "llmscale.node", *words]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as node:
        assert node.stderr is not None
        line: dict[str, Any] = json.loads(node.stderr.readline())
        # Not killed: it has a folder of sockets to remove.
        node.terminate()
        node.communicate(timeout=60)
    return line


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            ("--cpus", "64"),
            {
                "executor": "native",
                "executor_reason": "auto is native for one rank on the CPU",
                "threads": 1,
                "quantization": "none",
            },
        ),
        (
            ("-tp", "2", "--threads", "3", "--quantization", "int8"),
            {
                "executor": "torch",
                "executor_reason": "the native executor runs one rank, not 2",
                "threads": 3,
                "quantization": "int8",
            },
        ),
    ],
    ids=["native", "torch"],
)
def test_a_node_says_what_will_compute(options: tuple[str, ...], said: dict[str, Any], tmp_path: Path) -> None:
    line = first_words(tmp_path, *options)
    assert line["event"] == "node listens"
    assert line | said | {"device": "cpu"} == line
