"""The base install: no torch, numpy or safetensors anywhere, and the embedded model is served and answers as ever.

Method: every process of a real server, and one with `LLM`, is started where these packages cannot be found, as in an
environment that has the base dependencies alone. What needs torch says so, and how to get it. The servers of the client
suites are started in the same way.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmscale import LLM, SamplingParams
from tests.fakes.without_torch.sitecustomize import ABSENT
from tests.processes import base_install, serving

PROMPT = "Once upon a time"
TOKENS = 40
FROM_THE_CHECKOUT = "are not installed; from the checkout: pip install '.[{}]'"

ALONE = f"""
import json, sys
from llmscale import LLM, SamplingParams
llm = LLM("tiny-chat", threads=1)
text = llm.generate({PROMPT!r}, SamplingParams(temperature=0, max_tokens={TOKENS}))[0].outputs[0].text
print(json.dumps([text, sorted(set(sys.modules) & set({sorted(ABSENT)!r}))]))
"""


@pytest.fixture
def without_torch() -> Iterator[None]:
    with base_install():
        yield


def expected() -> str:
    params = SamplingParams(temperature=0, max_tokens=TOKENS)
    return LLM("tiny-chat", threads=1).generate(PROMPT, params)[0].outputs[0].text


@pytest.mark.usefixtures("without_torch")
def test_the_embedded_model_runs_offline() -> None:
    run = subprocess.run([sys.executable, "-c", ALONE], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout) == [expected(), []]


@pytest.mark.usefixtures("without_torch")
def test_the_embedded_model_is_served_and_survives_a_killed_worker() -> None:
    with serving("tiny-chat", "--threads", "1") as server:
        body = {"model": "tiny-chat", "prompt": PROMPT, "temperature": 0, "max_tokens": TOKENS}
        first = server.post("/v1/completions", body).json()["choices"][0]["text"]
        os.kill(server.worker_pid(), 9)
        again = server.post("/v1/completions", body).json()["choices"][0]["text"]
    assert (first, again) == (expected(), expected())


@pytest.mark.usefixtures("without_torch")
@pytest.mark.parametrize("option", [("--executor", "torch"), ("-tp", "2")])
def test_what_needs_torch_says_so_before_anything_is_started(option: tuple[str, str]) -> None:
    command = [sys.executable, "-m", "llmscale.cli", "serve", "tiny-chat", "--port", "0", *option]
    run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert run.returncode == 1
    (line,) = run.stderr.splitlines()
    assert f"and torch, numpy, safetensors {FROM_THE_CHECKOUT.format('node')}" in line


@pytest.mark.usefixtures("without_torch")
@pytest.mark.parametrize("words", [("quantize", "tiny-chat", "out"), ("eval", "tiny-chat")], ids=lambda words: words[0])
def test_a_command_that_needs_torch_is_one_line(words: tuple[str, ...], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "llmscale.cli", *words]
    run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, cwd=tmp_path)
    assert (run.returncode, run.stdout) == (1, "")
    needs = f"needs more than the base install: torch, numpy, safetensors {FROM_THE_CHECKOUT.format('node')}"
    assert run.stderr == f"llmscale: llmscale {words[0]} {needs}\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("without_torch")
@pytest.mark.parametrize("words", [("info",), ("quantize", "--method", "keep")], ids=lambda words: words[0])
def test_a_gguf_file_needs_a_package_more_and_is_one_line(words: tuple[str, ...], tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="needs the package gguf: pip install '.[node,gguf]'")
    from tests.gguf_files import gguf_tokenizer, write_dense, write_gguf

    file = tmp_path / "model.gguf"
    write_gguf(file, tmp_path / "dense", write_dense(tmp_path / "dense"), tokenizer=gguf_tokenizer())
    target = [str(tmp_path / "out")] if words[0] == "quantize" else []
    command = [sys.executable, "-m", "llmscale.cli", words[0], str(file), *target, *words[1:]]
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, env=environment)
    assert run.returncode == 1
    (line,) = run.stderr.splitlines()
    assert line.endswith(f"torch, numpy, safetensors {FROM_THE_CHECKOUT.format('node,gguf')}")
