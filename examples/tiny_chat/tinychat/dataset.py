"""Endless training batches of constant shape from the task generators, resumable from one integer.

A batch is a flat list of tokens in groups of rows of one length: single questions go into the shortest row that fits,
one long row is filled with many turns or with stories. A row whose group is full is dropped: making an item
costs 40 us, padding one would cost more. Batch n depends on (seed, n) alone. Knows nothing of the model.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmscale.embedded.tasks import TASKS, Item, draw, sample
from llmscale.embedded.tasks.stories import story_text
from tinychat.chat_format import END_OF_TEXT_ID, ChatEncoder
from tinychat.model import RowGroup

STORY_WEIGHT = 0.25
"""Loss weight of a token of free text: it carries mostly entropy, and would otherwise be most of the loss."""
DOCUMENT_SHARE = 0.2
"""Share of packed rows that are plain stories without chat turns."""
LONG_ITEMS = tuple(task for task in TASKS if task.name in ("story", "remember"))
DOCUMENT = len(TASKS)
"""Task index of plain documents in the loss table."""
_TASK_INDEX = {task.name: place for place, task in enumerate(TASKS)}


@dataclass(frozen=True, slots=True)
class BatchShape:
    """(length, rows) of rows with one item each, and of rows that are packed with turns, stories or documents."""

    single: tuple[tuple[int, int], ...] = ((20, 9), (24, 5), (32, 5), (48, 7))
    packed: tuple[tuple[int, int], ...] = ((192, 1),)

    def groups(self) -> tuple[RowGroup, ...]:
        groups, start = [], 0
        for length, rows in (*self.single, *self.packed):
            groups.append(RowGroup(start, rows, length))
            start += rows * length
        return tuple(groups)


LONG_SHAPE = BatchShape(single=(), packed=((1024, 1),))
FULL_SHAPE = BatchShape(single=(), packed=((2048, 1),))
"""Batches of one long row, so that contexts up to the limit are not unseen; drawn now and then."""


@dataclass(frozen=True, slots=True)
class Batch:
    """ids, positions: int64 [tokens]; places: int64 [n], tokens whose successor is trained; the rest: [n] of those."""

    groups: tuple[RowGroup, ...]
    ids: Tensor
    positions: Tensor
    places: Tensor
    targets: Tensor
    weights: Tensor
    tasks: Tensor


@dataclass(slots=True)
class _Row:
    """Token ids of a row, and for each the loss weight and task of predicting it."""

    ids: list[int]
    weights: list[float]
    tasks: list[int]

    def add(self, ids: Sequence[int], weight: float, task: int) -> None:
        self.ids.extend(ids)
        self.weights.extend([weight] * len(ids))
        self.tasks.extend([task] * len(ids))


class BatchStream:
    """Makes batch n on demand."""

    def __init__(self, encoder: ChatEncoder, seed: int) -> None:
        self._encoder = encoder
        self._seed = seed

    def batch(self, number: int, shape: BatchShape) -> Batch:
        rng = random.Random(f"{self._seed}:{number}")
        rows = self._single_rows(rng, shape)
        for length, count in shape.packed:
            rows += [
                self._document(rng, length) if rng.random() < DOCUMENT_SHARE else self._turns(rng, length)
                for _ in range(count)
            ]
        return _assemble(shape.groups(), rows)

    def _item(self, item: Item, row: _Row) -> None:
        encoded = self._encoder.item(item)
        task = _TASK_INDEX[item.task]
        row.add(encoded.prompt, 0.0, task)
        row.add(encoded.answer, STORY_WEIGHT if item.task == "story" else 1.0, task)

    def _single_rows(self, rng: random.Random, shape: BatchShape) -> list[_Row]:
        filled: list[list[_Row]] = [[] for _ in shape.single]
        missing = sum(rows for _, rows in shape.single)
        while missing:
            row = _Row([], [], [])
            self._item(draw(rng, test=False), row)
            place = next((i for i, (length, _) in enumerate(shape.single) if len(row.ids) <= length), None)
            if place is None or len(filled[place]) == shape.single[place][1]:
                continue
            filled[place].append(row)
            missing -= 1
        return [row for rows in filled for row in rows]

    def _turns(self, rng: random.Random, length: int) -> _Row:
        """Many turns; every third row begins with a long item, which fits no single row."""
        row = _Row([], [], [])
        item = sample(rng.choice(LONG_ITEMS), rng, test=False) if rng.random() < 1 / 3 else draw(rng, test=False)
        while len(row.ids) < length:
            self._item(item, row)
            row.add(self._encoder.newline, 0.0, 0)
            item = draw(rng, test=False)
        return row

    def _document(self, rng: random.Random, length: int) -> _Row:
        row = _Row([], [], [])
        while len(row.ids) < length:
            row.add((*self._encoder.ids(story_text(rng)), END_OF_TEXT_ID), STORY_WEIGHT, DOCUMENT)
        return row


def _assemble(groups: tuple[RowGroup, ...], rows: list[_Row]) -> Batch:
    ids: list[int] = []
    positions: list[int] = []
    trained: list[tuple[int, int, float, int]] = []
    cursor = iter(rows)
    for group in groups:
        for _ in range(group.rows):
            row = next(cursor)
            start, used = len(ids), min(len(row.ids), group.length)
            ids += row.ids[:used] + [END_OF_TEXT_ID] * (group.length - used)
            positions += range(group.length)
            trained += [
                (start + place - 1, row.ids[place], row.weights[place], row.tasks[place])
                for place in range(1, used)
                if row.weights[place] > 0.0
            ]
    places, targets, weights, tasks = zip(*trained, strict=True)
    return Batch(
        groups,
        torch.tensor(ids),
        torch.tensor(positions),
        torch.tensor(places),
        torch.tensor(targets),
        torch.tensor(weights),
        torch.tensor(tasks),
    )
