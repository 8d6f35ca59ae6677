"""Quantized models from end to end: the same model offline and served, ranks and all, by name in the numerics."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmscale import LLM, SamplingParams
from llmscale.embedded import embedded_model_path
from llmscale.models.quantizer import layout_for, quantize_folder
from tests.processes import serving

QUESTIONS = {"What is 23 + 45?": "68", "Sort: 40, 10, 20, 60": "10, 20, 40, 60"}
GREEDY = SamplingParams(temperature=0, max_tokens=24)


def answers(llm: LLM) -> list[str]:
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    return [output.outputs[0].text for output in llm.chat(chats, GREEDY)]


def test_a_model_still_answers_when_it_is_quantized_while_it_is_loaded() -> None:
    for name, kind in (("int8", "int8"), ("int4", "int4-g32"), ("int4-128", "int4-g128")):
        llm = LLM("tiny-chat", quantization=name, threads=1)
        assert answers(llm) == list(QUESTIONS.values()), name
        assert kind in llm.numerics


@pytest.mark.parametrize("name", ["int8", "int4-64"])
def test_a_written_copy_answers_as_what_is_quantized_while_it_is_loaded(name: str, tmp_path: Path) -> None:
    """Both round alike, so every id of a long answer is the same."""
    layout = layout_for("int8") if name == "int8" else layout_for("int4", 64)
    quantize_folder(embedded_model_path("tiny-chat"), tmp_path / "copy", layout)
    params = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
    models = (LLM(tmp_path / "copy", threads=1), LLM("tiny-chat", quantization=name, threads=1))
    first, second = (llm.generate(["Once upon a time"], params)[0].outputs[0].token_ids for llm in models)
    assert first == second
    assert models[0].numerics == models[1].numerics


def test_two_ranks_serve_what_one_process_computes() -> None:
    with serving("tiny-chat", "--quantization", "int4", "--dtype", "float32", "--threads", "1", "-tp", "2") as server:
        for question, answer in QUESTIONS.items():
            asked = {"model": "tiny-chat", "temperature": 0, "messages": [{"role": "user", "content": question}]}
            reply = server.post("/v1/chat/completions", asked).json()
            assert reply["choices"][0]["message"]["content"] == answer
