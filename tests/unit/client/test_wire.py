"""Bytes of the protocol: what the client writes is fixed for ever, and nothing but a node's message is read."""

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmscale.client import wire
from llmscale.errors import TransportError
from llmscale.types import SamplingParams


def frame(tag: int, body: object, version: int = 1) -> bytes:
    packed: bytes = msgpack.packb((version, tag, body), use_single_float=True)
    return packed


# Written out by hand from the protocol's tables: array of three, version 1, tag, body.
GOLDEN = {
    "hello": ("93 01 00 94 92 01 01 a1 63 a1 66 c0", lambda: wire.hello("c", "f", None)),
    "hello to one model": ("93 01 00 94 92 01 01 a1 63 a1 66 93 a1 6d c0 c0", lambda: wire.hello("c", "f", "m")),
    "abort": ("93 01 02 93 cd 01 2c 01 c0", lambda: wire.abort(300, 1, None)),
    "abort at a token": ("93 01 02 93 07 01 05", lambda: wire.abort(7, 1, 5)),
    "ping": ("93 01 04 91 cf ff ff ff ff ff ff ff ff", lambda: wire.ping((1 << 64) - 1)),
    "goodbye": ("93 01 05 90", wire.goodbye),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_a_message_has_the_bytes_that_it_always_had(name):
    expected, make = GOLDEN[name]
    assert make() == bytes.fromhex(expected)


def test_a_submission_has_the_bytes_that_it_always_had():
    params = SamplingParams(temperature=0, max_tokens=2, stop_token_ids=[9], logit_bias={3: -1}, logprobs=0)
    made = wire.submit(
        5,
        1,
        namespace=bytes(32),
        priority="batch",
        prompt=[1, 200],
        sampling=wire.sampling_fields(params, seed=6, choice=1, max_tokens=2),
        remaining_us=70_000,
    )
    one, zero = "ca 3f 80 00 00", "ca 00 00 00 00"
    sampling = f"9f {zero} 00 {one} {zero} {one} {zero} {zero} 06 01 00 91 92 03 ca bf 80 00 00 02 00 91 09 c2"
    assert made == bytes.fromhex(f"93 01 01 99 05 01 c4 20 {'00' * 32} 02 92 01 cc c8 02 {sampling} ce 00 01 11 70 c2")


def test_floats_take_32_bits_also_when_the_caller_gave_a_whole_number():
    fields = wire.sampling_fields(SamplingParams(temperature=1, top_p=1), seed=0, choice=0, max_tokens=1)
    assert [type(value) for value in fields[:1] + fields[2:7]] == [float] * 6


def test_outputs_are_read_into_columns():
    columns = [4, [1, 1], [1, 1], [0, 1], [70, 71], [[1, [-0.5, [[71, -0.5], [2, -3.0]]]]], [[0, 64]], [[1, 1, 1, 2]]]
    message = wire.decode(frame(1, [9, 2, columns]))
    assert isinstance(message, wire.Outputs)
    assert message.columns.tokens == [70, 71]
    assert message.columns.logprobs[0][1].top == [(71, -0.5), (2, -3.0)]
    assert message.columns.cached == [(0, 64)]
    assert wire.FINISH_REASONS[message.columns.finished[0].reason] == "length"


def test_fields_that_a_later_version_adds_to_the_handshake_are_passed_over():
    model = ["m", "r", None, bytes(32), bytes(32), "cpu", "new"]
    limits = [100, 64, 8, 8, 10, 32, [2], "new"]
    message = wire.decode(frame(0, [1, 7, 1, model, limits, {"new": 1}]))
    assert isinstance(message, wire.Welcome)
    assert message.limits.eos_tokens == [2]


@pytest.mark.parametrize(
    "body",
    [
        [9, 2, [4, [1], [1], [0], [70, 71], [], [], []]],
        [9, 2, [4, [1], [1], [0], [70], [[1, [-0.5, []]]], [], []]],
        [9, 2, [4, [1], [1], [0], [70], [], [[1, 64]], []]],
        [9, 2, [4, [1], [1], [0], [-1], [], [], []]],
        [9, 2, [4, [1], [1], [0], [1 << 32], [], [], []]],
        [9, 2, [4, [1], [1], [0], ["70"], [], [], []]],
        [9, 2, [4, [], [], [], [], [], [], [[1, 1, 7, 2]]]],
        [9, 2, [4, [], [], [], [], [], [], []], 0],
        [9, 2],
        {},
    ],
)
def test_outputs_that_break_the_protocol_are_refused(body):
    with pytest.raises(TransportError):
        wire.decode(frame(1, body))


def test_another_version_and_an_unknown_message_are_named():
    with pytest.raises(TransportError, match="version 2"):
        wire.decode(frame(5, [0, 0, 0], version=2))
    with pytest.raises(TransportError, match="message 8"):
        wire.decode(frame(8, []))


def test_a_frame_over_the_limit_is_refused_unread():
    with pytest.raises(TransportError, match="16777217 bytes"):
        wire.decode(bytes(wire.MAX_FRAME_BYTES + 1))


@given(st.binary(max_size=200) | st.binary(max_size=60).map(lambda tail: b"\x93\x01" + tail))
def test_any_bytes_give_a_message_or_a_typed_error(data):
    try:
        message = wire.decode(data)
    except TransportError:
        return
    assert isinstance(message, wire.FromNode)


def test_nesting_without_end_is_refused():
    with pytest.raises(TransportError):
        wire.decode(b"\x93\x01\x01" + b"\x91" * 100_000)
