"""OpenAI's format without a server: bodies, events cut anywhere, errors by their code."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmscale import errors
from llmscale.client import http_format
from llmscale.client.calls import Call, split_input
from llmscale.client.http_format import EventDecoder, HttpReply
from llmscale.client.results import ModelInfo
from llmscale.types import SamplingParams

MODEL = ModelInfo("tiny", 128)


def call(prompt="hi", params=None, *, streaming=True, timeout=None):
    text, messages = split_input(prompt)
    return Call(text, messages, params, None, "standard", timeout, streaming)


def body(given):
    return json.loads(http_format.request_body(given, MODEL))


def events(*payloads):
    return b"".join(b"data: " + json.dumps(payload).encode() + b"\n\n" for payload in payloads)


def piece(text, finish=None, index=0):
    return {"id": "cmpl-1", "choices": [{"index": index, "text": text, "logprobs": None, "finish_reason": finish}]}


def test_without_sampling_the_server_decides():
    assert body(call(streaming=False)) == {"model": "tiny", "prompt": "hi"}


def test_a_chat_and_a_prompt_of_ids_are_told_apart():
    chat = body(call([{"role": "user", "content": "hi"}], SamplingParams(max_tokens=None, logprobs=2)))
    assert chat["messages"] == [{"role": "user", "content": "hi"}]
    assert chat["top_logprobs"] == 2
    assert "max_completion_tokens" not in chat
    assert body(call([1, 2, 3]))["prompt"] == [1, 2, 3]


def test_a_seed_beyond_63_bits_is_the_same_seed_modulo_its_width():
    seed = body(call(params=SamplingParams(seed=(1 << 64) - 1)))["seed"]
    assert seed % (1 << 64) == (1 << 64) - 1
    assert seed == -1


def test_no_limit_is_worked_out_for_ids_and_refused_for_text():
    assert body(call([1, 2, 3], SamplingParams(max_tokens=None)))["max_tokens"] == 125
    with pytest.raises(errors.InvalidField, match="max_tokens"):
        http_format.request_body(call("hi", SamplingParams(max_tokens=None)), MODEL)


@pytest.mark.parametrize("given_prompt", [3, [1, "a"], [True], [-1], None, [{"role": "user"}, 1]])
def test_an_input_of_another_kind_is_refused(given_prompt):
    with pytest.raises(errors.InvalidField):
        split_input(given_prompt)


@pytest.mark.parametrize("empty", ["", []])
def test_an_empty_prompt_is_refused(empty):
    with pytest.raises(errors.InvalidField):
        call(empty)


def test_a_timeout_must_be_above_zero():
    with pytest.raises(errors.InvalidField, match="timeout"):
        call(timeout=0.0)


ITSELF = []
ITSELF.append(ITSELF)


@pytest.mark.parametrize(
    ("prompt", "field"),
    [
        ("\ud800", "prompt"),
        ([{"role": "user", "content": "a\udfff"}], "messages"),
        ([{"role": "user", "content": object()}], "messages"),
        ([{"role": "user", "content": ITSELF}], "messages"),
    ],
)
def test_what_json_cannot_say_is_refused_by_its_field(prompt, field):
    with pytest.raises(errors.InvalidField, match=f"{field} cannot be written as JSON") as refused:
        http_format.request_body(call(prompt), MODEL)
    assert refused.value.field == field


STREAM = (
    events(piece("Hel"), piece("lo \u00e9\u4e2d"), piece("", "stop"))
    + b": restarts 2\n\n"
    + events({"id": "cmpl-1", "choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 4}})
    + b"data: [DONE]\n\n"
)


@given(st.lists(st.integers(1, 40), max_size=30))
def test_events_are_the_same_however_their_bytes_are_cut(sizes):
    reply = HttpReply(call())
    chunks, at = [], 0
    for size in [*sizes, len(STREAM)]:
        chunks += reply.feed(STREAM[at : at + size])
        at += size
    for chunk in chunks:
        reply.assembly.add(chunk)
    output = reply.assembly.output(finished=True)
    assert reply.done
    assert output.outputs[0].text == "Hello \u00e9\u4e2d"
    assert output.outputs[0].finish_reason == "stop"
    assert output.usage.completion_tokens == 4


def test_carriage_returns_and_comments_are_no_data():
    assert list(EventDecoder().feed(b": ping\r\n\r\ndata: 1\r\n\r\nrest")) == [b": ping", b"data: 1"]


@pytest.mark.parametrize("comment", [b"soon", b"-1", b"", b"9" * 5_000, b"\xff"])
def test_a_comment_that_only_begins_like_a_count_of_restarts_is_a_comment(comment):
    reply = HttpReply(call())
    [chunk] = reply.feed(b": restarts 2\n: restarts " + comment + b"\n" + events(piece("Hel")))
    assert (chunk.text, chunk.restarts) == ("Hel", 2)


def test_an_error_in_the_middle_of_a_stream_is_raised_with_its_type():
    reply = HttpReply(call())
    reply.feed(events(piece("Hel")))
    with pytest.raises(errors.RequestPoisoned, match="died twice"):
        reply.feed(events({"error": {"message": "the worker died twice", "code": "request_poisoned"}}))


def test_an_end_before_every_choice_has_ended_is_an_error():
    reply = HttpReply(call(params=SamplingParams(n=2)))
    reply.feed(events(piece("a", "stop", 0)))
    with pytest.raises(errors.TransportError, match="1 of 2"):
        reply.feed(b"data: [DONE]\n\n")


def test_an_event_that_is_not_the_format_is_an_error():
    with pytest.raises(errors.TransportError):
        HttpReply(call()).feed(b'data: {"choices": 3}\n\n')


def every_class(kind=errors.LlmscaleError):
    yield kind
    for child in kind.__subclasses__():
        if child.__module__ == errors.__name__:
            yield from every_class(child)


@pytest.mark.parametrize("kind", list(every_class()), ids=lambda kind: kind.__name__)
def test_every_error_of_the_tree_comes_back_as_itself(kind):
    sent = {"error": {"message": "why", "type": "x", "param": "stop", "code": kind.code}}
    found = http_format.error_of(kind.http_status, {"retry-after": "7"}, json.dumps(sent).encode())
    assert type(found) is kind
    assert str(found) == "why"
    if isinstance(found, errors.Overloaded):
        assert found.retry_after_seconds == 7
    if isinstance(found, errors.RequestError):
        assert found.field == "stop"


def test_an_unknown_code_keeps_its_name_and_falls_back_by_status():
    def found(status):
        return http_format.error_of(status, {}, b'{"error": {"message": "m", "code": "new_code"}}')

    assert (type(found(403)), found(403).code) == (errors.RequestError, "new_code")
    assert (type(found(500)), found(500).code) == (errors.RequestFailed, "new_code")
    assert type(found(429)) is errors.Overloaded


def test_a_proxy_s_page_is_a_transport_error_that_shows_its_beginning():
    error = http_format.error_of(502, {}, b"<html>Bad Gateway</html>")
    assert isinstance(error, errors.TransportError)
    assert "Bad Gateway" in str(error)


def test_log_probabilities_of_a_completion_name_their_tokens_by_text():
    answer = piece("ab", "stop")
    answer["choices"][0]["logprobs"] = {
        "tokens": ["a", "b"],
        "token_logprobs": [-0.5, -1.0],
        "top_logprobs": [{"a": -0.5}, {"c": -0.1, "b": -1.0}],
        "text_offset": [0, 1],
    }
    [chunk] = HttpReply(call(streaming=False)).whole(json.dumps(answer).encode())
    first, second = chunk.logprobs
    assert [(entry.text, entry.rank) for entry in second] == [("b", 2), ("c", 1), ("b", 2)]
    assert first[0].token_id is None


@pytest.mark.parametrize(
    ("asked", "tops", "shown"),
    [
        (2, {"c": -0.1, "d": -0.5, "b": -1.0}, [("b", None), ("c", 1), ("d", 2)]),
        (3, {"c": -0.1, "d": -0.5, "b": -1.0}, [("b", 3), ("c", 1), ("d", 2), ("b", 3)]),
        (0, {"b": -1.0}, [("b", None)]),
        (1, {"b": -1.0}, [("b", 1), ("b", 1)]),
    ],
)
def test_a_drawn_token_beyond_those_that_were_asked_for_has_no_rank_and_is_shown_once(asked, tops, shown):
    answer = piece("b", "stop")
    answer["choices"][0]["logprobs"] = {"tokens": ["b"], "token_logprobs": [-1.0], "top_logprobs": [tops]}
    reply = HttpReply(call(params=SamplingParams(logprobs=asked), streaming=False))
    [chunk] = reply.whole(json.dumps(answer).encode())
    [row] = chunk.logprobs
    assert [(entry.text, entry.rank) for entry in row] == shown
    assert row[0].logprob == -1.0


def test_parts_of_characters_that_read_alike_are_ranked_by_their_bytes():
    answer = {"choices": [{"index": 0, "message": {"role": "assistant", "content": "é"}, "finish_reason": "stop"}]}
    values = ((-0.1, 0xC3), (-2.0, 0xA9))
    likely = [{"token": "\ufffd", "logprob": value, "bytes": [byte]} for value, byte in values]
    answer["choices"][0]["logprobs"] = {"content": [{**likely[1], "top_logprobs": likely}]}
    [chunk] = HttpReply(call([{"role": "user", "content": "hi"}], streaming=False)).whole(json.dumps(answer).encode())
    [entry] = chunk.logprobs
    assert [(one.logprob, one.rank) for one in entry] == [(-2.0, 2), (-0.1, 1), (-2.0, 2)]


def test_health_sums_the_replicas():
    fleet = {
        "state": "ready",
        "queued_requests": 2,
        "replicas": [
            {"running": 3, "waiting": 1, "worker_restarts": 1},
            {"running": 4, "waiting": 0, "worker_restarts": 0},
        ],
    }
    health = http_format.health(json.dumps(fleet).encode())
    assert (health.ready, health.running, health.waiting, health.worker_restarts) == (True, 7, 3, 1)
