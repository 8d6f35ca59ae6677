"""Slurm's short form of host names, written out: `rack[0-1]n[01-03,7],login` has nine names.

Linear in the names, which are counted before they are made. Several brackets in one word multiply, the last one
fastest, as `scontrol show hostnames` prints them. It knows no host and no other variable.
"""

from __future__ import annotations

import itertools
import math
import re

from llmscale.errors import ConfigError

MAX_LIST_CHARACTERS = 65_536
# A word of names and brackets; a comma within brackets does not end it.
_WORD = re.compile(r"(?:[A-Za-z0-9._-]|\[[0-9,-]+\])+")
_PIECE = re.compile(r"\[([0-9,-]+)\]|([A-Za-z0-9._-]+)")
_RANGE = re.compile(r"([0-9]{1,9})(?:-([0-9]{1,9}))?")


def expand_node_list(text: str, source: str, max_nodes: int) -> list[str]:
    """All names, in order. Raises ConfigError that names `source` for a list that is wrong or too long."""
    if len(text) > MAX_LIST_CHARACTERS:
        raise ConfigError(f"{source} has {len(text):,} characters, the limit is {MAX_LIST_CHARACTERS:,}")
    names: list[str] = []
    position = 0
    while True:
        word = _WORD.match(text, position)
        if word is None:
            raise ConfigError(
                f"{source} is {_short(text)}, which is no list of nodes; set --leader and --hosts instead"
            )
        pieces = [_numbers(piece[1], text, source) if piece[1] else (piece[2],) for piece in _PIECE.finditer(word[0])]
        if len(names) + math.prod(len(piece) for piece in pieces) > max_nodes:
            raise ConfigError(f"{source} is {_short(text)}, which names more than {max_nodes:,} nodes")
        names += ["".join(parts) for parts in itertools.product(*pieces)]
        position = word.end()
        if position == len(text):
            return names
        if text[position] != ",":
            raise ConfigError(
                f"{source} is {_short(text)}, which is no list of nodes; set --leader and --hosts instead"
            )
        position += 1


class _Numbers:
    """Ranges of one bracket, counted without being written out."""

    def __init__(self, ranges: list[tuple[int, int, int]]) -> None:
        self._ranges = ranges

    def __len__(self) -> int:
        return sum(last - first + 1 for first, last, _ in self._ranges)

    def __iter__(self) -> itertools.chain[str]:
        return itertools.chain.from_iterable(
            (f"{number:0{width}d}" for number in range(first, last + 1)) for first, last, width in self._ranges
        )


def _numbers(inside: str, text: str, source: str) -> _Numbers:
    ranges = []
    for part in inside.split(","):
        found = _RANGE.fullmatch(part)
        first, last = (found[1], found[2] or found[1]) if found else ("1", "0")
        if int(first) > int(last):
            raise ConfigError(f"{source} is {_short(text)}, in which {part!r} is no range of numbers")
        ranges.append((int(first), int(last), len(first)))
    return _Numbers(ranges)


def _short(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:77] + "...")
