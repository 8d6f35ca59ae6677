"""A client's conversation with a node, in virtual time and without a socket."""

import msgpack
import pytest

from llmscale import errors
from llmscale.client.session import MAX_SILENCE_SECONDS, NodeSession, refusal_error

NODE = 77
SAMPLING = (0.0, 0, 1.0, 0.0, 1.0, 0.0, 0.0, 0, 0, None, (), 8, 0, (), False)


def frame(tag, *body):
    return msgpack.packb((1, tag, body), use_single_float=True)


def welcome(node=NODE, epoch=1):
    model = ("tiny", "r1", None, bytes(32), bytes(32), "cpu")
    return frame(0, 1, node, epoch, model, (400, 128, 8, 8, 64, 32, (2,)))


def outputs(rows, finished=(), *, cached=(), node=NODE, epoch=1, attempt=1):
    requests, indexes, tokens = (list(column) for column in zip(*rows, strict=True)) if rows else ([], [], [])
    return frame(1, node, epoch, (1, requests, [attempt] * len(rows), indexes, tokens, (), cached, finished))


def tags(session):
    sent = [msgpack.unpackb(data)[1] for data in session.outgoing]
    session.outgoing.clear()
    return sent


def submit(session, **options):
    fields = {"namespace": bytes(32), "priority": "standard", "remaining_us": None} | options
    return session.submit([1, 2], SAMPLING, **fields)


@pytest.fixture
def session():
    made = NodeSession(name="test", fleet="llmscale")
    made.link_up(0.0)
    made.receive(welcome(), 0.0)
    made.outgoing.clear()
    return made


def test_it_greets_every_100_ms_until_it_is_welcome():
    session = NodeSession(name="test", fleet="llmscale")
    assert session.next_due() is None
    session.link_up(5.0)
    assert tags(session) == [0]
    assert session.next_due() == pytest.approx(5.1)
    session.tick(5.05)
    assert tags(session) == []
    session.tick(5.1)
    assert tags(session) == [0]
    session.receive(welcome(), 5.15)
    session.tick(5.3)
    assert tags(session) == []


def test_it_pings_every_second_and_gives_a_silent_node_up(session):
    session.tick(1.0)
    assert tags(session) == [4]
    session.receive(frame(4, NODE, 1, 1), 1.5)
    request = submit(session)
    now = 1.5 + MAX_SILENCE_SECONDS + 0.01
    session.tick(now)
    [delivery] = session.take()
    assert delivery.request == request
    assert isinstance(delivery.failure, errors.TransportError)
    assert session.welcome is None


def test_tokens_of_one_visit_come_as_one_delivery_with_the_end(session):
    request = submit(session)
    session.receive(outputs([(request, 0, 10)]), 0.1)
    session.receive(outputs([(request, 1, 11)], [(request, 1, 1, 2)]), 0.1)
    [delivery] = session.take()
    assert (delivery.index, delivery.tokens, delivery.finish_reason) == (0, [10, 11], "length")
    assert delivery.output_tokens == 2
    assert session.take() == []
    assert session.live_requests == 0


def test_what_was_found_cached_is_told_with_every_delivery(session):
    other, request = submit(session), submit(session)
    session.receive(outputs([(other, 0, 9), (request, 0, 10)], cached=[(1, 64)]), 0.1)
    assert [delivery.cached_tokens for delivery in session.take()] == [0, 64]
    session.receive(outputs([(request, 1, 11)]), 0.1)
    assert [delivery.cached_tokens for delivery in session.take()] == [64]


def test_a_token_that_comes_twice_counts_once(session):
    request = submit(session)
    session.receive(outputs([(request, 0, 10), (request, 0, 10), (request, 1, 11)]), 0.1)
    assert session.take()[0].tokens == [10, 11]


def test_a_missing_token_ends_the_request_on_both_sides(session):
    request = submit(session)
    tags(session)
    session.receive(outputs([(request, 0, 10), (request, 2, 12), (request, 3, 13)]), 0.1)
    [delivery] = session.take()
    assert isinstance(delivery.failure, errors.TransportError)
    assert tags(session) == [2]


def test_an_end_that_counts_other_tokens_is_a_gap(session):
    request = submit(session)
    session.receive(outputs([(request, 0, 10)], [(request, 1, 0, 2)]), 0.1)
    assert isinstance(session.take()[0].failure, errors.TransportError)


def test_frames_of_a_dead_worker_are_dropped_and_the_stream_goes_on(session):
    request = submit(session)
    session.receive(outputs([(request, 0, 10)]), 0.1)
    assert session.take()[0].restarts == 0
    session.receive(outputs([(request, 1, 11)], epoch=2), 0.2)
    session.receive(outputs([(request, 2, 99)], epoch=1), 0.3)
    session.receive(outputs([(request, 2, 12)], epoch=2), 0.4)
    [delivery] = session.take()
    assert delivery.tokens == [11, 12]
    assert delivery.restarts == 1


def test_a_node_that_was_started_again_fails_what_ran(session):
    submit(session)
    session.receive(outputs([], node=NODE + 1), 0.1)
    assert isinstance(session.take()[0].failure, errors.TransportError)


def test_a_second_answer_to_a_repeated_greeting_changes_nothing(session):
    request = submit(session)
    session.receive(welcome(), 0.1)
    session.receive(outputs([(request, 0, 10)]), 0.2)
    assert session.take()[0].failure is None


def test_an_aborted_request_is_told_to_the_node_once_and_delivers_nothing_more(session):
    request = submit(session)
    tags(session)
    session.receive(outputs([(request, 0, 10)]), 0.1)
    session.abort(request, 1)
    session.abort(request)
    session.receive(outputs([(request, 1, 11)], [(request, 1, 2, 2)]), 0.2)
    assert tags(session) == [2]
    assert session.take() == []


def test_a_lost_connection_fails_everything_at_once_and_it_greets_again(session):
    first, second = submit(session), submit(session)
    session.link_down("the connection was lost")
    assert {delivery.request for delivery in session.take()} == {first, second}
    tags(session)
    session.link_up(3.0)
    assert tags(session) == [0]


def test_bytes_that_are_no_message_cost_the_conversation(session):
    submit(session)
    session.receive(b"HTTP/1.1 400 Bad Request\r\n", 0.1)
    assert isinstance(session.take()[0].failure, errors.TransportError)


@pytest.mark.parametrize(
    ("code", "kind"),
    [(0, errors.TransportError), (1, errors.ConfigError), (2, errors.UnknownModel), (3, errors.Unavailable)],
)
def test_a_refused_greeting_says_why(code, kind):
    session = NodeSession(name="test", fleet="llmscale")
    session.link_up(0.0)
    session.receive(frame(5, code, "the reason", (1, 1)), 0.0)
    assert isinstance(session.refusal, kind)
    assert "the reason" in str(session.refusal)


def test_a_node_that_forgot_this_client_is_greeted_again(session):
    submit(session)
    session.receive(frame(5, 5, "the first frame is a Hello", (1, 1)), 0.1)
    assert session.refusal is None
    assert isinstance(session.take()[0].failure, errors.TransportError)
    tags(session)
    session.tick(0.2)
    assert tags(session) == [0]


def test_status_is_kept(session):
    counts = [3, 2, 50, 0, 60, 9, 0, 0, 0, 0, 0, 0, 0, None, 7, 3, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]
    session.receive(frame(3, NODE, 1, 1, *counts), 0.1)
    assert session.status is not None
    assert (session.status.running, session.status.waiting) == (3, 2)


@pytest.mark.parametrize(
    ("refusal", "kind"),
    [
        ([0, 9, 8, 0, 2_500_000], errors.Overloaded),
        ([1, 200, 128], errors.RequestTooLong),
        ([2], errors.InvalidField),
        ([3, 500, 400], errors.InvalidField),
        ([4], errors.InvalidField),
        ([5], errors.TransportError),
        ([6], errors.Unavailable),
        ([0, 1], errors.TransportError),
        (None, errors.Unavailable),
    ],
)
def test_every_refusal_is_a_typed_error(refusal, kind):
    error = refusal_error(refusal)
    assert type(error) is kind
    if kind is errors.RequestTooLong:
        assert str(error).startswith("This model's maximum context length is 128 tokens (max_sequence_tokens")


def test_an_overloaded_node_says_when_to_come_back(session):
    request = submit(session)
    session.receive(frame(2, NODE, 1, request, 1, (0, 9, 8, 0, 2_500_000), False), 0.1)
    failure = session.take()[0].failure
    assert isinstance(failure, errors.Overloaded)
    assert failure.retry_after_seconds == 2.5


def test_a_node_that_tells_of_its_cache_unasked_is_greeted_anew(session):
    submit(session)
    session.receive(frame(7, NODE, 1, 1, []), 0.1)
    assert "has not asked for" in str(session.take()[0].failure)
    tags(session)
    session.tick(0.3)
    assert tags(session) == [0]
