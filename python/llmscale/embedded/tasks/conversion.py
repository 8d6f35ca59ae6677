"""Unit conversion by whole factors, in both directions where the result is whole.

The key is the pair of units with the amount; every pair is trained, one amount in ten is held out.
Generation is O(1). Units are a table: a new one is a line.
"""

import random

from llmscale.embedded.tasks.item import Item

FACTORS = (
    ("kilometers", "meters", 1000, 99),
    ("meters", "centimeters", 100, 99),
    ("centimeters", "millimeters", 10, 200),
    ("kilograms", "grams", 1000, 99),
    ("liters", "milliliters", 1000, 99),
    ("tons", "kilograms", 1000, 99),
    ("hours", "minutes", 60, 24),
    ("minutes", "seconds", 60, 30),
    ("days", "hours", 24, 14),
    ("weeks", "days", 7, 30),
    ("years", "months", 12, 20),
    ("feet", "inches", 12, 20),
    ("yards", "feet", 3, 60),
    ("dozen", "pieces", 12, 20),
    ("dollars", "cents", 100, 99),
)
"""(large unit, small unit, factor, largest amount of the large unit)."""

_WORDING = ("Convert {n} {a} to {b}.", "How many {b} are {n} {a}?", "{n} {a} in {b}?", "What is {n} {a} in {b}?")


def convert(rng: random.Random) -> Item:
    large, small, factor, limit = rng.choice(FACTORS)
    amount = rng.randint(2, limit)
    if rng.random() < 0.6:
        given, source, target, result = amount, large, small, amount * factor
    else:
        given, source, target, result = amount * factor, small, large, amount
    question = rng.choice(_WORDING).format(n=given, a=source, b=target)
    return Item(
        (question,),
        f"{result} {target}",
        "convert",
        f"{given} {source} {target}",
        0 if factor in (10, 100, 1000) else 1,
    )
