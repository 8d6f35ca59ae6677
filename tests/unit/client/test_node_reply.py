"""What a node's answer becomes without a tokenizer, and how it ends badly."""

import pytest

from llmscale import errors
from llmscale.client import wire
from llmscale.client.calls import Call
from llmscale.client.node_reply import NodeReply
from llmscale.client.session import Delivery
from llmscale.types import SamplingParams

LIMITS = wire.NodeLimits(
    vocabulary=400,
    max_sequence_tokens=128,
    max_sequences=8,
    max_waiting_sequences=8,
    total_blocks=64,
    block_tokens=32,
    eos_tokens=[2],
)


def reply(*, timeout=None, max_tokens=8):
    params = SamplingParams(max_tokens=max_tokens)
    return NodeReply(Call((3, 4), None, params, None, "standard", timeout, True), LIMITS, None, "request-1")


def test_an_answer_that_a_node_ends_for_its_time_names_the_timeout_that_the_client_gave():
    late = reply(timeout=0.25)
    late.started(7, 0)
    late.accept(Delivery(7, 0, [5]))
    late.accept(Delivery(7, 1, finish_reason="deadline_exceeded"))
    assert isinstance(late.error, errors.ClientTimeout)
    assert str(late.error) == "no complete answer within 0.25 s (timeout); the request was cancelled"


def test_a_node_that_ends_an_answer_without_a_timeout_for_its_time_is_believed():
    late = reply()
    late.started(7, 0)
    late.accept(Delivery(7, 0, finish_reason="deadline_exceeded"))
    assert isinstance(late.error, errors.DeadlineExceeded)


def test_an_answer_that_does_not_fit_names_the_setting_of_the_node():
    reply(max_tokens=126)
    with pytest.raises(
        errors.RequestTooLong,
        match=r"maximum context length is 128 tokens \(max_sequence_tokens, the server's --max-mo",
    ):
        reply(max_tokens=127)
