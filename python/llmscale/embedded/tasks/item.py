"""One question with its exact answer, and the rule that splits questions into training and test.

An item is a short conversation whose last answer is to be produced. The split is a pure function of the item's key,
so that no list of test items has to be stored: one key in ten is for tests only, in every wording where the key
is the content (two operands), and in one wording where the content is a fact that cannot be derived (a capital).
This file knows nothing of tokens or of any single task.
"""

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass

TEST_ONE_IN = 10
"""One key in this many is held out from training."""


@dataclass(frozen=True, slots=True)
class Item:
    """A conversation: `turns` alternate user and assistant and end with a user; `answer` is the one right reply.

    `key` decides the split. `difficulty` is 0 (easy) to 2 (hard), for the table of results.
    """

    turns: tuple[str, ...]
    answer: str
    task: str
    key: str
    difficulty: int = 0

    @property
    def question(self) -> str:
        return self.turns[-1]

    @property
    def messages(self) -> tuple[dict[str, str], ...]:
        """The turns as a chat, for a template."""
        return tuple(
            {"role": ("user", "assistant")[place % 2], "content": turn} for place, turn in enumerate(self.turns)
        )


@dataclass(frozen=True, slots=True)
class Task:
    """A family of items. `weight` is its share of the training items; `graded` tasks have exactly one right answer."""

    name: str
    generate: Callable[[random.Random], Item]
    weight: float
    graded: bool = True


def is_test_key(task: str, key: str) -> bool:
    """Whether a key belongs to the test split; independent of the process (Python's own `hash` is salted)."""
    digest = hashlib.blake2b(f"{task}\n{key}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % TEST_ONE_IN == 0


def sample(task: Task, rng: random.Random, *, test: bool) -> Item:
    """Draw items until one falls into the wanted split.

    Raises RuntimeError if 100,000 draws find none: the task then has too few keys to be split.
    """
    for _ in range(100_000):
        item = task.generate(rng)
        if not task.graded or is_test_key(item.task, item.key) == test:
            return item
    raise RuntimeError(
        f"task {task.name!r} gave no item of the {'test' if test else 'training'} split in 100,000 draws"
    )
