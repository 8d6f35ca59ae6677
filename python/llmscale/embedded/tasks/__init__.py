"""The registry of task families: one line per task with its share of the training items.

A share is relative; arithmetic and sorting get most because they must be learned, not remembered. The order is fixed,
because evaluation and progress tables are printed in it. Adding a task is one function and one line here.
"""

import random

from llmscale.embedded.tasks import arithmetic, conversation, conversion, extraction, facts, sorting, stories
from llmscale.embedded.tasks.item import Item, Task, is_test_key, sample

__all__ = ["TASKS", "Item", "Task", "draw", "is_test_key", "sample"]

TASKS = (
    Task("add_two_digits", arithmetic.add_two_digits, 14.0),
    Task("subtract_two_digits", arithmetic.subtract_two_digits, 17.0),
    Task("add_three_digits", arithmetic.add_three_digits, 4.5),
    Task("subtract_three_digits", arithmetic.subtract_three_digits, 5.0),
    Task("multiply_table", arithmetic.multiply_table, 1.5),
    Task("multiply_two_by_one_digit", arithmetic.multiply_two_by_one_digit, 4.0),
    Task("compare", arithmetic.compare, 3.0),
    Task("sort_numbers", sorting.sort_numbers, 22.0),
    Task("sort_long", sorting.sort_long, 2.0),
    Task("sort_words", sorting.sort_words, 14.0),
    Task("list_questions", sorting.list_questions, 5.0),
    Task("repeat", sorting.repeat, 4.0),
    Task("spell", sorting.spell, 5.0),
    Task("convert", conversion.convert, 5.0),
    Task("extract_json", extraction.extract_json, 5.0),
    Task("facts", facts.answer_fact, 6.5),
    Task("small_talk", conversation.small_talk, 1.5),
    Task("remember", conversation.remember, 3.0),
    Task("acknowledge", conversation.acknowledge, 1.0),
    Task("story", stories.story, 2.0, graded=False),
)

_WEIGHTS = tuple(task.weight for task in TASKS)


def draw(rng: random.Random, *, test: bool) -> Item:
    """One item of a task drawn by weight, of the wanted split."""
    return sample(rng.choices(TASKS, _WEIGHTS)[0], rng, test=test)
