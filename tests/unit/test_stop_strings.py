"""Stop strings are found wherever the pieces are cut, and nothing of them is shown."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from llmscale.stop_strings import StopMatcher

LETTERS = st.text(alphabet="abc", max_size=40)
STOPS = st.lists(st.text(alphabet="abc", min_size=1, max_size=5), min_size=1, max_size=4)


def shown_by(matcher: StopMatcher, pieces: list[str]) -> str:
    shown = ""
    for piece in pieces:
        shown += matcher.push(piece)
        if matcher.matched is not None:
            return shown
    return shown + matcher.finish()


def read_by_character(text: str, stops: list[str]) -> tuple[str, str | None]:
    """The definition: read one character at a time until a stop string ends here; the longest one of those that do."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            longest = max(ending, key=len)
            return text[: end - len(longest)], longest
    return text, None


@given(LETTERS, STOPS, st.lists(st.integers(1, 7), max_size=40))
def test_any_cut_gives_what_reading_by_character_gives(text: str, stops: list[str], cuts: list[int]) -> None:
    pieces, rest = [], text
    for cut in cuts:
        pieces.append(rest[:cut])
        rest = rest[cut:]
    matcher = StopMatcher(stops)
    assert (shown_by(matcher, [*pieces, rest]), matcher.matched) == read_by_character(text, stops)


@given(LETTERS, STOPS)
def test_what_is_held_back_is_shorter_than_the_longest_stop_string(text: str, stops: list[str]) -> None:
    matcher = StopMatcher(stops)
    shown = 0
    for position, character in enumerate(text, start=1):
        shown += len(matcher.push(character))
        if matcher.matched is not None:
            return
        assert position - shown < max(map(len, stops))


def test_a_match_over_three_pieces_is_found_and_its_parts_are_not_shown() -> None:
    matcher = StopMatcher(["</answer>"])
    assert [matcher.push(piece) for piece in ("so 4", "2</a", "nsw", "er> and")] == ["so 4", "2", "", ""]
    assert matcher.matched == "</answer>"


def test_the_match_is_shown_when_it_is_asked_for() -> None:
    matcher = StopMatcher(["END"], include_match=True)
    assert matcher.push("the ENDless") == "the END"


def test_a_possible_prefix_is_shown_when_the_text_ends() -> None:
    matcher = StopMatcher(["stop now"])
    assert matcher.push("do not stop") == "do not "
    assert matcher.finish() == "stop"


def test_a_repetitive_stop_string_costs_linear_time() -> None:
    matcher = StopMatcher(["a" * 511 + "b"])
    shown = matcher.push("a" * 200_000)
    assert len(shown) == 200_000 - 511
