"""Finds stop strings in text that arrives piece by piece.

`StopMatcher` runs one Knuth-Morris-Pratt automaton per stop string: O(characters) per stop string whatever the strings
are, because a quadratic search would let a client stall the event loop. It holds back exactly the longest tail that may
still become a match, so no part of a stop string is shown. It knows nothing of tokens: the caller counts the pieces it
pushed.
"""

from __future__ import annotations

from collections.abc import Sequence


def _failure_table(pattern: str) -> list[int]:
    """For each length of matched prefix, the length of its longest proper border (Knuth, Morris and Pratt, 1977)."""
    table = [0] * (len(pattern) + 1)
    border = 0
    for position in range(1, len(pattern)):
        while border and pattern[position] != pattern[border]:
            border = table[border]
        if pattern[position] == pattern[border]:
            border += 1
        table[position + 1] = border
    return table


class StopMatcher:
    """Watches one text. After `matched` is set, nothing more may be pushed."""

    __slots__ = ("_held", "_include", "_states", "_stops", "_tables", "matched")

    def __init__(self, stops: Sequence[str], *, include_match: bool = False) -> None:
        assert stops, "a matcher needs at least one stop string"
        assert all(stops), "a matcher needs at least one non-empty stop string"
        # Longest first: of two that complete on the same character, the one that began first wins.
        self._stops = tuple(sorted(stops, key=len, reverse=True))
        self._tables = tuple(_failure_table(stop) for stop in self._stops)
        self._states = [0] * len(self._stops)
        self._include = include_match
        self._held = ""
        self.matched: str | None = None

    def push(self, piece: str) -> str:
        """Takes the next piece of text and returns what may be shown now. Sets `matched` when a stop string is
        complete.

        The match that completes first wins, as if the text were read one character at a time.
        """
        assert self.matched is None, "text was pushed after the match"
        text = self._held + piece
        best_end = len(piece)
        for index, stop in enumerate(self._stops):
            end = self._advance(index, piece, best_end)
            if end is not None and (self.matched is None or end < best_end):
                best_end = end
                self.matched = stop
        if self.matched is not None:
            end_in_text = len(self._held) + best_end
            self._held = ""
            return text[: end_in_text if self._include else end_in_text - len(self.matched)]
        shown = len(text) - max(self._states)
        self._held = text[shown:]
        return text[:shown]

    def finish(self) -> str:
        """Ends the text: what was held back is shown, because no match can complete any more."""
        held, self._held = self._held, ""
        return held

    def _advance(self, index: int, piece: str, limit: int) -> int | None:
        """Feeds up to `limit` characters to one automaton; the number of characters after which its string is
        complete."""
        stop, table, state = self._stops[index], self._tables[index], self._states[index]
        for position in range(limit):
            character = piece[position]
            while state and character != stop[state]:
                state = table[state]
            if character == stop[state]:
                state += 1
                if state == len(stop):
                    return position + 1
        self._states[index] = state
        return None
