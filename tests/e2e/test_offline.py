"""Offline inference: what a script gets from `LLM`, held against transformers, a server and itself.

One model in float32 for all tests of this file: ids there do not depend on what else is in a batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from llmscale import LLM, Client, SamplingParams, errors
from llmscale.embedded import embedded_model_path
from llmscale.llm import MAX_AHEAD
from llmscale.tokenizer import Tokenizer
from tests.fakes.tiny_tokenizer import write_metaspace
from tests.processes import Server, serving

PROMPTS = ["Once upon a time", "The old sailor", "What is 23 + 45?", "A list of colours: red,"]
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
QUESTION = [{"role": "user", "content": "What is 23 + 45?"}]


@pytest.fixture(scope="module")
def llm() -> LLM:
    """Few slots and short steps, so that a handful of prompts already waits, is cut into chunks and batched."""
    return LLM("tiny-chat", dtype="float32", max_num_seqs=4, max_num_batched_tokens=16, threads=1)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving("tiny-chat", "--dtype", "float32", "--threads", "1") as server:
        yield server


def ids(llm: LLM, prompts: Any, params: Any) -> list[list[tuple[int, ...]]]:
    return [[choice.token_ids for choice in output.outputs] for output in llm.generate(prompts, params)]


def test_greedy_ids_are_those_of_transformers_unless_two_logits_tie(llm: LLM) -> None:
    import transformers

    oracle = transformers.AutoModelForCausalLM.from_pretrained(embedded_model_path("tiny-chat"), dtype=torch.float32)
    for prompt, [found] in zip(PROMPTS, ids(llm, PROMPTS, GREEDY), strict=True):
        sequence = llm.tokenizer.encode(prompt)
        with torch.no_grad():
            logits = oracle(torch.tensor([[*sequence, *found]])).logits[0, len(sequence) - 1 : -1]
        for row, token in zip(logits, found, strict=True):
            # Torch's products and ours differ in the last bits of a sum over some hundred terms.
            assert row.max() - row[token] < 1e-3


def test_outputs_come_in_the_order_of_the_prompts_and_say_what_they_cost(llm: LLM) -> None:
    outputs = llm.generate(PROMPTS * 3, GREEDY)
    assert [output.prompt for output in outputs] == PROMPTS * 3
    for output in outputs:
        assert output.finished
        assert output.outputs[0].finish_reason == "length"
        assert output.prompt_token_ids == tuple(llm.tokenizer.encode(str(output.prompt)))
        assert output.outputs[0].text == llm.tokenizer.decode(output.outputs[0].token_ids)
        assert output.usage.prompt_tokens == len(output.prompt_token_ids)
        assert output.usage.completion_tokens == len(output.outputs[0].token_ids) == 24
    assert len({output.request_id for output in outputs}) == len(outputs)
    assert ids(llm, PROMPTS[0], GREEDY) == ids(llm, [PROMPTS[0]], GREEDY)
    assert llm.generate([], GREEDY) == []


def test_a_prompt_of_ids_is_the_prompt_of_its_text(llm: LLM) -> None:
    encoded = [llm.tokenizer.encode(prompt) for prompt in PROMPTS]
    assert ids(llm, encoded, GREEDY) == ids(llm, PROMPTS, GREEDY)
    assert ids(llm, encoded[0], GREEDY) == ids(llm, PROMPTS[0], GREEDY)
    assert llm.generate(encoded[0], GREEDY)[0].prompt is None


def test_a_prompt_that_was_rendered_before_is_the_prompt_of_its_conversation(llm: LLM) -> None:
    [answer] = llm.chat(QUESTION, GREEDY)
    rendered = llm.tokenizer.decode(answer.prompt_token_ids, skip_special_tokens=False)
    parsed, plain = llm.generate(rendered, GREEDY, parse_special_tokens=True), llm.generate(rendered, GREEDY)
    assert parsed[0].prompt_token_ids == answer.prompt_token_ids
    assert parsed[0].outputs[0].token_ids == answer.outputs[0].token_ids
    assert not set(plain[0].prompt_token_ids) & set(llm.tokenizer.control_ids.values())


def test_a_completion_goes_on_from_its_prompt_and_a_chat_begins_a_text_unless_its_last_message_is_open(
    llm: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = Tokenizer(write_metaspace(tmp_path))
    word = tokenizer.encode("hello")[1]
    assert tokenizer.token_bytes(word) == b" h"
    monkeypatch.setattr(llm, "tokenizer", tokenizer)
    params = SamplingParams(temperature=0, max_tokens=2, logit_bias={word: 1_000.0}, ignore_eos=True)
    for prompt in ("hello", tokenizer.encode("hello")):
        assert llm.generate(prompt, params)[0].outputs[0].text == " h h"
    assert llm.chat(QUESTION, params)[0].outputs[0].text == "h h"
    gone_on = llm.chat(QUESTION, params, add_generation_prompt=False, continue_final_message=True)
    assert gone_on[0].outputs[0].text == " h h"
    with pytest.raises(errors.InvalidField, match="cannot both be true"):
        llm.chat(QUESTION, params, continue_final_message=True)


def test_no_conversations_give_no_answers_and_an_empty_one_is_refused(llm: LLM) -> None:
    assert llm.chat([], GREEDY) == []
    assert llm.generate([], GREEDY) == []
    for conversations in ([[]], [QUESTION, []]):
        with pytest.raises(errors.InvalidField, match="at least 1 message is needed"):
            llm.chat(conversations, GREEDY)


@pytest.mark.parametrize(
    "prompts",
    [[[-1]], [[2_048]], [[1 << 70]], [[1.5]], [["a"]], [None], None, 5, [b"abc"], {"prompt": "a"}, ["\ud800"], [[]]],
)
def test_what_is_no_prompt_is_refused_as_a_request(llm: LLM, prompts: Any) -> None:
    assert llm.generate([[2_047]], GREEDY)[0].finished
    with pytest.raises(errors.RequestError):
        llm.generate(prompts, GREEDY)


def test_company_changes_no_id_of_a_seeded_request(llm: LLM) -> None:
    params = [SamplingParams(temperature=1, seed=seed, max_tokens=30, ignore_eos=True) for seed in range(len(PROMPTS))]
    together = ids(llm, PROMPTS, params)
    assert [ids(llm, prompt, one)[0] for prompt, one in zip(PROMPTS, params, strict=True)] == together
    assert ids(llm, PROMPTS[::-1], params[::-1]) == together[::-1]


@pytest.mark.parametrize("name", ["tiny-chat", "tiny-chat-mini"])
def test_embedded_models_add(name: str) -> None:
    assert LLM(name).chat(QUESTION, SamplingParams(max_tokens=8))[0].outputs[0].text == "68"


def test_a_request_is_answered_as_a_server_answers_it(llm: LLM, server: Server) -> None:
    params = SamplingParams(temperature=1, seed=11, max_tokens=30, n=2, logprobs=2, ignore_eos=True)
    with Client(server.base) as client:
        for prompt in PROMPTS:
            offline, served = llm.generate(prompt, params)[0], client.generate(prompt, params)
            assert [choice.text for choice in offline.outputs] == [choice.text for choice in served.outputs]
            assert [choice.finish_reason for choice in offline.outputs] == ["length", "length"]
            for one, other in zip(offline.outputs, served.outputs, strict=True):
                assert one.logprobs is not None
                assert other.logprobs is not None
                found = [(row[0].text, row[0].logprob) for row in one.logprobs]
                for (text, value), row in zip(found, other.logprobs, strict=True):
                    assert row[0].text == text
                    assert row[0].logprob == pytest.approx(value, abs=1e-4)
        assert llm.chat(QUESTION, GREEDY)[0].outputs[0].text == client.chat(QUESTION, GREEDY).outputs[0].text


def test_choices_without_a_seed_differ_and_a_new_llm_of_the_same_seed_repeats_them() -> None:
    params = SamplingParams(temperature=1, n=3, max_tokens=12, ignore_eos=True)

    def texts(seed: int) -> list[str]:
        made = LLM("tiny-chat", dtype="float32", seed=seed, threads=1)
        return [choice.text for output in made.generate(PROMPTS[:2], params) for choice in output.outputs]

    first = texts(0)
    assert len(set(first)) == 6
    assert texts(0) == first
    assert texts(1) != first


def test_prompts_that_are_alike_get_answers_of_their_own(llm: LLM) -> None:
    params = SamplingParams(temperature=1, max_tokens=12, ignore_eos=True)
    assert len({output.outputs[0].text for output in llm.generate([PROMPTS[0]] * 4, params)}) == 4


def test_a_batch_may_be_longer_than_the_queue(llm: LLM) -> None:
    prompts = [[300, 284, 10 + number % 400] for number in range(MAX_AHEAD + 100)]
    few = ids(llm, prompts[:50], SamplingParams(temperature=0, max_tokens=2, ignore_eos=True))
    found = ids(llm, prompts, SamplingParams(temperature=0, max_tokens=2, ignore_eos=True))
    assert found[:50] == few
    assert found[400:450] == few
    assert {len(tokens) for [tokens] in found} == {2}


def test_the_last_prompt_of_a_long_batch_is_refused_before_anything_is_computed(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed: list[object] = []
    with monkeypatch.context() as patch:
        patch.setattr(llm._steps, "compute", computed.append)
        with pytest.raises(errors.RequestTooLong):
            llm.generate([[300]] * MAX_AHEAD + [[300] * 2_048], GREEDY)
    assert not computed
    assert llm.generate(PROMPTS[0], GREEDY)[0].finished


def test_a_stop_string_and_a_stop_token_end_a_text_before_them(llm: LLM) -> None:
    free = llm.generate(PROMPTS[0], GREEDY)[0].outputs[0]
    word = free.text.split()[4]
    cut = llm.generate(PROMPTS[0], SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, stop=word))[0]
    assert cut.outputs[0].text == free.text[: free.text.index(word)]
    assert (cut.outputs[0].finish_reason, cut.outputs[0].stop_reason) == ("stop", word)
    assert cut.outputs[0].token_ids == free.token_ids[: cut.usage.completion_tokens]
    token = free.token_ids[10]
    by_token = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, stop_token_ids=[token])
    ended = llm.generate(PROMPTS[0], by_token)[0].outputs[0]
    assert ended.stop_reason == token
    assert ended.token_ids == free.token_ids[: free.token_ids.index(token) + 1]


def test_log_probabilities_have_a_row_per_token_with_the_drawn_one_first(llm: LLM) -> None:
    choice = llm.generate(PROMPTS[0], SamplingParams(temperature=1, seed=2, max_tokens=10, logprobs=4))[0].outputs[0]
    assert choice.logprobs is not None
    assert [row[0].token_id for row in choice.logprobs] == list(choice.token_ids)
    for row in choice.logprobs:
        assert [entry.rank for entry in row[1:]] == [1, 2, 3, 4]
        assert sorted((entry.logprob for entry in row[1:]), reverse=True) == [entry.logprob for entry in row[1:]]
    assert llm.generate(PROMPTS[0], GREEDY)[0].outputs[0].logprobs is None


@pytest.mark.parametrize(
    ("prompts", "params", "error"),
    [
        ([PROMPTS[0], [1] * 2_048], GREEDY, errors.RequestTooLong),
        ([PROMPTS[0], [1 << 20]], GREEDY, errors.InvalidField),
        ([PROMPTS[0], []], GREEDY, errors.InvalidField),
        (PROMPTS[0], SamplingParams(max_tokens=2_048), errors.RequestTooLong),
        (PROMPTS[:2], [GREEDY], errors.InvalidField),
        (PROMPTS[0], SamplingParams(stop_token_ids=[1 << 20]), errors.InvalidField),
    ],
    ids=["too long", "unknown id", "empty", "too many tokens", "params for one of two", "unknown stop token"],
)
def test_a_request_that_cannot_run_is_refused_and_leaves_nothing_behind(
    llm: LLM, prompts: Any, params: Any, error: type[errors.LlmscaleError]
) -> None:
    expected = ids(llm, PROMPTS, GREEDY)
    with pytest.raises(error):
        llm.generate(prompts, params)
    assert ids(llm, PROMPTS, GREEDY) == expected


def test_an_interruption_in_the_middle_leaves_the_llm_usable(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = ids(llm, PROMPTS, GREEDY)
    compute = llm._steps.compute
    calls: list[object] = []

    def interrupted(counts: Any) -> bool:
        calls.append(counts)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return compute(counts)

    with monkeypatch.context() as patch:
        patch.setattr(llm._steps, "compute", interrupted)
        with pytest.raises(KeyboardInterrupt):
            llm.generate(PROMPTS * 2, GREEDY)
    assert ids(llm, PROMPTS, GREEDY) == expected


@pytest.mark.parametrize(
    "options",
    [
        {"quantization": "int3"},
        {"deterministic": True, "executor": "torch"},
        {"executor": "natural"},
        {"executor": "native", "quantization": "int2"},
        {"dtype": "float17"},
        {"max_num_seqs": 0},
        {"kv_cache_bytes": 1},
        {"kv_host_bytes": -1},
    ],
    ids=str,
)
def test_an_option_that_does_not_fit_is_refused_with_advice(options: dict[str, Any]) -> None:
    with pytest.raises(errors.ConfigError):
        LLM("tiny-chat", **options)


def test_a_model_that_is_not_there_is_refused_by_name() -> None:
    with pytest.raises(errors.ModelError, match="no-such-model"):
        LLM("no-such-model")
