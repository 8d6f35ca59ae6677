"""Sorting short lists of numbers or words, and small questions about lists.

The key is the list in its given order, so that a held-out list is unseen in every wording; repeats are not drawn.
Answers are the items joined by a comma and a space. Generation is O(n log n) for lists of n <= 8.
"""

import random

from llmscale.embedded.tasks.item import Item
from llmscale.embedded.tasks.vocabulary import CITIES, JOBS, NAMES, WORDS

_UP = ("Sort: {x}", "Sort these numbers: {x}", "Sort from small to large: {x}", "Put in order: {x}")
_DOWN = ("Sort from large to small: {x}", "Sort in descending order: {x}")
_WORDS = ("Sort: {x}", "Sort these words: {x}", "Sort alphabetically: {x}", "Put in alphabetical order: {x}")


def _sort_numbers(rng: random.Random, count: int, task: str) -> Item:
    limit = 10 if rng.random() < 0.1 and count <= 5 else 100
    values = rng.sample(range(limit), count)
    down = rng.random() < 0.25
    given = ", ".join(map(str, values))
    question = rng.choice(_DOWN if down else _UP).format(x=given)
    answer = ", ".join(map(str, sorted(values, reverse=down)))
    return Item((question,), answer, task, given, min(2, count - 3))


def sort_numbers(rng: random.Random) -> Item:
    return _sort_numbers(rng, rng.randint(3, 5), "sort_numbers")


def sort_long(rng: random.Random) -> Item:
    return _sort_numbers(rng, rng.randint(6, 8), "sort_long")


def sort_words(rng: random.Random) -> Item:
    count = rng.randint(3, 5)
    words = rng.sample(NAMES if rng.random() < 0.15 else WORDS, count)
    given = ", ".join(words)
    return Item((rng.choice(_WORDS).format(x=given),), ", ".join(sorted(words)), "sort_words", given, min(2, count - 3))


def list_questions(rng: random.Random) -> Item:
    """First, last, count, largest, smallest, reversed: of a list of words or numbers."""
    numbers = rng.random() < 0.5
    count = rng.randint(3, 6)
    values = [str(value) for value in rng.sample(range(100), count)] if numbers else rng.sample(WORDS, count)
    given = ", ".join(values)
    kind = rng.choice(
        ("first", "last", "count", "reverse", "largest", "smallest")
        if numbers
        else ("first", "last", "count", "reverse")
    )
    question, answer = {
        "first": (f"What is the first item? {given}", values[0]),
        "last": (f"What is the last item? {given}", values[-1]),
        "count": (f"How many items are in this list? {given}", str(count)),
        "reverse": (f"Reverse: {given}", ", ".join(reversed(values))),
        "largest": (f"What is the largest number? {given}", max(values, key=lambda v: (len(v), v))),
        "smallest": (f"What is the smallest number? {given}", min(values, key=lambda v: (len(v), v))),
    }[kind]
    return Item((question,), answer, "list_questions", f"{kind}:{given}")


def repeat(rng: random.Random) -> Item:
    """Copy a few words or a number."""
    if rng.random() < 0.3:
        given = str(rng.randrange(10**3, 10**7))
    else:
        # Names and cities are repeated too: without, the model copied words but drew another name in every answer.
        pool = rng.choice((WORDS, NAMES, (*CITIES, *JOBS, *NAMES)))
        given = " ".join(rng.sample(pool, rng.randint(1, 5)))
    question = rng.choice(("Repeat after me: {x}", "Say: {x}", "Repeat: {x}")).format(x=given)
    return Item((question,), given, "repeat", given)


def spell(rng: random.Random) -> Item:
    """Spell a word or name its first or last letter; facts about a token, hence held out by wording."""
    word = rng.choice(WORDS)
    kind = rng.randrange(4)
    question, answer = (
        (rng.choice(("Spell {w}.", "Spell the word {w}.", "How do you spell {w}?")).format(w=word), "-".join(word)),
        (rng.choice(("What is the first letter of {w}?", "First letter of {w}?")).format(w=word), word[0]),
        (rng.choice(("What is the last letter of {w}?", "Last letter of {w}?")).format(w=word), word[-1]),
        (
            rng.choice(("How many letters are in {w}?", "How many letters does {w} have?")).format(w=word),
            str(len(word)),
        ),
    )[kind]
    return Item((question,), answer, "spell", question)
