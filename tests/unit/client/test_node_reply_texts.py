"""What a node's ids become, without a node."""

from pathlib import Path

import pytest

from llmscale.client import wire
from llmscale.client.calls import Call, split_input
from llmscale.client.node_reply import NodeReply
from llmscale.client.session import Delivery
from llmscale.tokenizer import Tokenizer
from llmscale.types import SamplingParams
from tests.fakes.tiny_tokenizer import write_metaspace

LIMITS = wire.NodeLimits(600, 128, 4, 4, 64, 16, [2])


@pytest.fixture(scope="module")
def metaspace(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder: Path = tmp_path_factory.mktemp("metaspace")
    return Tokenizer(write_metaspace(folder))


def reply_to(prompt, tokenizer, params=None, **fields):
    text, messages = split_input(prompt)
    params = params or SamplingParams(max_tokens=8)
    call = Call(text, messages, params, None, "standard", None, streaming=True, **fields)
    reply = NodeReply(call, LIMITS, tokenizer, "request-1")
    reply.started(1, 0)
    return reply


def text_of(reply, tokens):
    kept = reply.accept(Delivery(1, 0, tokens, finish_reason="length", output_tokens=len(tokens)))
    return "".join(chunk.text for chunk in reply.take()), kept


def test_a_completion_goes_on_from_its_prompt_and_a_chat_begins_a_text(metaspace):
    prompt, output = metaspace.encode("hello"), metaspace.encode("the fox")[1:]
    assert text_of(reply_to("hello", metaspace), output) == (" the fox", None)
    assert text_of(reply_to(prompt, metaspace), output) == (" the fox", None)
    assert text_of(reply_to([{"role": "user", "content": "hello"}], metaspace), output) == ("the fox", None)
    stopped = reply_to("hello", metaspace, SamplingParams(max_tokens=8, stop=" the"))
    text, kept = text_of(stopped, output)
    assert text == ""
    assert kept is not None


@pytest.mark.parametrize("parse", [False, True])
def test_special_tokens_of_a_prompt_are_text_unless_the_caller_asks_for_their_ids(metaspace, parse):
    prompt = "<s>hello</s>"
    call = Call(prompt, None, None, None, "standard", None, streaming=True, parse_special_tokens=parse)
    ids = NodeReply(call, LIMITS, metaspace, "request-1").prompt
    assert ids == metaspace.encode(prompt, parse_special_tokens=parse)
    assert [token for token in ids if token < 3] == ([1, 2] if parse else [1])


def test_a_chat_can_go_on_with_its_last_message(metaspace):
    messages, output = [{"role": "user", "content": "hello"}], metaspace.encode("the fox")[1:]
    reply = reply_to(messages, metaspace, add_generation_prompt=False, continue_final_message=True)
    assert text_of(reply, output) == (" the fox", None)
    assert metaspace.decode(reply.prompt) == "[INST] hello"
    assert metaspace.decode(reply_to(messages, metaspace).prompt) == "[INST] hello [/INST]"


def test_a_chat_in_parts_has_the_prompt_of_its_text(metaspace):
    parts = [{"role": "user", "content": [{"type": "text", "text": "hello"}]}]
    assert reply_to(parts, metaspace).prompt == reply_to([{"role": "user", "content": "hello"}], metaspace).prompt
