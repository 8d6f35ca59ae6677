"""Lists of items by seed: unseen ones to grade answers with, and seen ones to calibrate with.

Both are functions of a count and a seed alone, so that a list is named and not stored. Items of one list differ from
each other. Cost is that of drawing the items, about 40 us each. It knows nothing of tokens or models.
"""

import random

from llmscale.embedded.tasks import TASKS
from llmscale.embedded.tasks.item import Item, sample

_MAX_REPEATS = 500
"""Draws in a row that gave nothing new, after which a task has no more."""


def unseen_items(count: int, seed: int) -> list[Item]:
    """About `count` different test items, spread evenly over the graded tasks.

    A task whose held-out questions run out (the one-digit table) gives fewer; the rest is given by the tasks after it.
    """
    items: list[Item] = []
    graded = sorted((task for task in TASKS if task.graded), key=lambda task: task.weight)
    for place, task in enumerate(graded):
        rng = random.Random(f"test:{seed}:{task.name}")
        wanted = (count - len(items)) // (len(graded) - place)
        seen: set[tuple[str, ...]] = set()
        repeats = 0
        while len(seen) < wanted and repeats < _MAX_REPEATS:
            item = sample(task, rng, test=True)
            if item.turns in seen:
                repeats += 1
                continue
            repeats = 0
            seen.add(item.turns)
            items.append(item)
    return items


def seen_items(count: int, seed: int) -> list[Item]:
    """`count` different items of the training split, drawn by the tasks' weights, stories among them."""
    rng = random.Random(f"seen:{seed}")
    weights = [task.weight for task in TASKS]
    found: dict[tuple[str, ...], Item] = {}
    while len(found) < count:
        item = sample(rng.choices(TASKS, weights)[0], rng, test=False)
        found[item.turns] = item
    return list(found.values())
