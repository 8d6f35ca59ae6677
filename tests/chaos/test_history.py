"""Goal: the checker finds every fault that a fleet could commit, names it, and accuses nobody who is innocent.

Method: a history of three streams in virtual time, with one fault planted at a time; innocent streams whose tokens are
cut into events at random places.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.chaos.history import Answer, Event, History, Kind, faults, gaps

WORDS = {number: tuple(f"{letter}{place} " for place in range(20)) for number, letter in enumerate("abc")}
REFERENCES = {number: Answer(words, "".join(words), "length") for number, words in WORDS.items()}
Plant = Callable[[list[Event]], list[Event]]


def innocent(request: int, cuts: tuple[int, ...] = (0, 5, 11, 20)) -> list[Event]:
    """The events of one stream, its tokens cut into events at these places."""
    answer = REFERENCES[request]
    events = [Event(request, 0.0, Kind.SENT)]
    for begin, end in itertools.pairwise(cuts):
        tokens = answer.tokens[begin:end]
        events.append(Event(request, float(end), Kind.TOKENS, tokens, "".join(tokens)))
    ends = [(Kind.FINISH, "length", 0), (Kind.USAGE, "", 20), (Kind.DONE, "", 0), (Kind.CLOSED, "", 0)]
    return events + [Event(request, 30.0, kind, text=text, count=count) for kind, text, count in ends]


def recorded(streams: list[list[Event]]) -> History:
    """A history of streams that went on at the same time."""
    now = [0.0]
    history = History(lambda: now[0])
    for number in range(len(streams)):
        history.send(number, number)
    for row in itertools.zip_longest(*(stream[1:] for stream in streams)):
        for event in row:
            if event is not None:
                now[0] = event.at
                history.record(event.request, event.kind, tokens=event.tokens, text=event.text, count=event.count)
    return history


def with_tokens(events: list[Event], tokens: list[str]) -> list[Event]:
    """The same stream with other tokens, all in one event, and a usage that agrees with them."""
    kept = [event for event in events if event.kind not in {Kind.TOKENS, Kind.USAGE}]
    met = Event(events[0].request, 5.0, Kind.TOKENS, tuple(tokens), "".join(tokens))
    usage = Event(events[0].request, 30.0, Kind.USAGE, count=len(tokens))
    return [kept[0], met, kept[1], usage, *kept[2:]]


def tokens_of(events: list[Event]) -> list[str]:
    return [token for event in events for token in event.tokens]


def lose(events: list[Event]) -> list[Event]:
    tokens = tokens_of(events)
    return with_tokens(events, tokens[:7] + tokens[9:])


def lose_the_end(events: list[Event]) -> list[Event]:
    return with_tokens(events, tokens_of(events)[:18])


def double(events: list[Event]) -> list[Event]:
    tokens = tokens_of(events)
    return with_tokens(events, tokens[:9] + tokens[6:])


def reorder(events: list[Event]) -> list[Event]:
    tokens = tokens_of(events)
    return with_tokens(events, [*tokens[:7], tokens[8], tokens[7], *tokens[9:]])


def mix_in_another(events: list[Event]) -> list[Event]:
    tokens = tokens_of(events)
    return with_tokens(events, [*tokens[:7], REFERENCES[2].tokens[7], *tokens[8:]])


def go_on_after_the_limit(events: list[Event]) -> list[Event]:
    return with_tokens(events, [*tokens_of(events), "more "])


def without(kind: Kind) -> Plant:
    return lambda events: [event for event in events if event.kind is not kind]


def twice(kind: Kind) -> Plant:
    return lambda events: [copy for event in events for copy in ([event] * (1 + (event.kind is kind)))]


def say_another_usage(events: list[Event]) -> list[Event]:
    return [Event(e.request, e.at, e.kind, e.tokens, e.text, 19 if e.kind is Kind.USAGE else e.count) for e in events]


def finish_otherwise(events: list[Event]) -> list[Event]:
    return [
        Event(e.request, e.at, e.kind, e.tokens, "stop" if e.kind is Kind.FINISH else e.text, e.count) for e in events
    ]


def answer_after_the_end(events: list[Event]) -> list[Event]:
    tokens = next(event for event in events if event.kind is Kind.TOKENS)
    rest = [event for event in events if event is not tokens]
    return [*rest[:-1], tokens, rest[-1]]


def fail(events: list[Event]) -> list[Event]:
    return [*events[:3], Event(events[0].request, 12.0, Kind.FAILED, text="HTTP 500: sorry")]


def spoil_the_text(events: list[Event]) -> list[Event]:
    return [
        Event(e.request, e.at, e.kind, e.tokens, e.text.upper() if e.kind is Kind.TOKENS else e.text, e.count)
        for e in events
    ]


PLANTS: list[tuple[Plant, str]] = [
    (lose, "2 tokens lost at token 7"),
    (lose_the_end, "tokens lost at the end: 2 after token 18"),
    (double, "3 tokens doubled at token 9"),
    (reorder, "tokens reordered at token 7"),
    (mix_in_another, "a foreign token at token 7"),
    (go_on_after_the_limit, "tokens beyond the end: 1 after token 20"),
    (without(Kind.FINISH), "0 events of kind 'finish'"),
    (without(Kind.USAGE), "0 events of kind 'usage'"),
    (without(Kind.DONE), "0 events of kind 'done'"),
    (without(Kind.CLOSED), "0 events of kind 'closed'"),
    (twice(Kind.FINISH), "2 events of kind 'finish'"),
    (twice(Kind.DONE), "2 events of kind 'done'"),
    (twice(Kind.TOKENS), "tokens doubled"),
    (say_another_usage, "the usage says 19 tokens, 20 came"),
    (finish_otherwise, "finished by 'stop', the reference by 'length'"),
    (answer_after_the_end, "'tokens' comes after 'done'"),
    (fail, "failed: HTTP 500: sorry"),
    (spoil_the_text, "the text differs though the tokens do not"),
]


@pytest.mark.parametrize(("plant", "line"), PLANTS, ids=[line for _, line in PLANTS])
def test_a_planted_fault_is_found_in_its_stream_alone(plant: Plant, line: str) -> None:
    found = faults(recorded([innocent(0), plant(innocent(1)), innocent(2)]), REFERENCES)
    assert found
    assert all(fault.startswith("request 1: ") for fault in found)
    assert any(line in fault for fault in found), found


@given(st.lists(st.lists(st.integers(1, 19), unique=True).map(sorted), min_size=3, max_size=3))
def test_innocent_streams_are_not_accused_however_their_tokens_come(cuts: list[list[int]]) -> None:
    streams = [innocent(number, (0, *places, 20)) for number, places in enumerate(cuts)]
    assert faults(recorded(streams), REFERENCES) == []


def test_a_request_is_sent_once() -> None:
    history = History()
    history.send(4, 0)
    with pytest.raises(AssertionError, match="request 4 was sent before"):
        history.send(4, 0)


def test_a_gap_is_the_longest_wait_between_tokens() -> None:
    history = recorded([innocent(0, (0, 2, 3, 9, 20)), innocent(1, (0, 20))])
    assert gaps(history) == {0: 11.0}
