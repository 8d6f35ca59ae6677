"""Addition, subtraction and multiplication of small non-negative integers, in several wordings.

The key is the pair of operands, sorted where the operation commutes, so that a held-out sum is unseen in every wording
and in both orders. The exception is the table of one-digit products: 100 facts that cannot be derived from each other,
held out by wording. Two-digit answers are plain digits; longer ones follow the column working (as in Nye et al.
2021, "Show your work"): 60,000 examples of it taught the three-digit sums that none had without. O(1) per item.
"""

import random

from llmscale.embedded.tasks.item import Item

_ADD = (
    "What is {a} + {b}?",
    "{a} + {b} =",
    "{a}+{b}",
    "Add {a} and {b}.",
    "What is {a} plus {b}?",
    "Calculate {a} + {b}.",
)
_SUBTRACT = (
    "What is {a} - {b}?",
    "{a} - {b} =",
    "{a}-{b}",
    "Subtract {b} from {a}.",
    "What is {a} minus {b}?",
    "Calculate {a} - {b}.",
)
_MULTIPLY = ("What is {a} * {b}?", "{a} * {b} =", "{a}*{b}", "Multiply {a} by {b}.", "What is {a} times {b}?")


def _operand(rng: random.Random, digits: int) -> int:
    return rng.randrange(10 ** (digits - 1), 10**digits)


def _column_digits(a: int, b: int) -> list[tuple[int, int]]:
    """Digits of a and b by column, units first, the shorter filled with zeros."""
    columns = max(len(str(a)), len(str(b)))
    return [(a // 10**place % 10, b // 10**place % 10) for place in range(columns)]


def addition_working(a: int, b: int) -> str:
    """`8+5=13, 4+3+1=8: 93` for 48 + 35: columns from the right, each with its carry, then the sum."""
    parts, carry = [], 0
    for x, y in _column_digits(a, b):
        total = x + y + carry
        parts.append(f"{x}+{y}{'+1' if carry else ''}={total}")
        carry = total // 10
    return f"{', '.join(parts)}: {a + b}"


def subtraction_working(a: int, b: int) -> str:
    """`12-8=4, 5-3-1=1: 14` for 52 - 38: columns from the right; a borrow adds ten, the next column pays."""
    parts, borrow = [], 0
    for x, y in _column_digits(a, b):
        lent = 10 if x - y - borrow < 0 else 0
        parts.append(f"{x + lent}-{y}{'-1' if borrow else ''}={x + lent - y - borrow}")
        borrow = lent // 10
    return f"{', '.join(parts)}: {a - b}"


def product_working(a: int, b: int) -> str:
    """`8*6=48, 9*6=54, 54+4=58: 588` for 98 * 6, where a has two digits and b one."""
    units, tens = a % 10 * b, a // 10 * b
    return f"{a % 10}*{b}={units}, {a // 10}*{b}={tens}, {tens}+{units // 10}={tens + units // 10}: {a * b}"


def _add(rng: random.Random, digits: int, task: str) -> Item:
    a, b = _operand(rng, digits), _operand(rng, rng.choice((digits, digits, digits, max(1, digits - 1))))
    if rng.random() < 0.5:
        a, b = b, a
    carries = (a % 10 + b % 10 >= 10) + (a % 100 + b % 100 >= 100)
    question = rng.choice(_ADD).format(a=a, b=b)
    answer = str(a + b) if digits < 3 else addition_working(a, b)
    return Item((question,), answer, task, f"{min(a, b)}+{max(a, b)}", carries)


def _subtract(rng: random.Random, digits: int, task: str) -> Item:
    a, b = _operand(rng, digits), _operand(rng, rng.choice((digits, digits, digits, max(1, digits - 1))))
    a, b = max(a, b), min(a, b)
    borrows = (a % 10 < b % 10) + (a % 100 < b % 100)
    question = rng.choice(_SUBTRACT).format(a=a, b=b)
    answer = str(a - b) if digits < 3 else subtraction_working(a, b)
    return Item((question,), answer, task, f"{a}-{b}", borrows)


def add_two_digits(rng: random.Random) -> Item:
    return _add(rng, 2, "add_two_digits")


def add_three_digits(rng: random.Random) -> Item:
    return _add(rng, 3, "add_three_digits")


def subtract_two_digits(rng: random.Random) -> Item:
    return _subtract(rng, 2, "subtract_two_digits")


def subtract_three_digits(rng: random.Random) -> Item:
    return _subtract(rng, 3, "subtract_three_digits")


def multiply_table(rng: random.Random) -> Item:
    """One-digit products (and by ten): facts, held out by wording."""
    a, b = rng.randint(1, 10), rng.randint(1, 10)
    question = rng.choice(_MULTIPLY).format(a=a, b=b)
    return Item((question,), str(a * b), "multiply_table", question)


def multiply_two_by_one_digit(rng: random.Random) -> Item:
    a, b = rng.randrange(11, 100), rng.randrange(2, 10)
    key, answer = f"{a}*{b}", product_working(a, b)
    if rng.random() < 0.5:
        a, b = b, a
    return Item((rng.choice(_MULTIPLY).format(a=a, b=b),), answer, "multiply_two_by_one_digit", key, 1)


def compare(rng: random.Random) -> Item:
    """Which of two different numbers is larger or smaller."""
    digits = rng.choice((2, 3))
    a = _operand(rng, digits)
    b = _operand(rng, digits)
    while b == a:
        b = _operand(rng, digits)
    larger = rng.random() < 0.5
    word = rng.choice(("larger", "bigger", "greater")) if larger else rng.choice(("smaller", "less"))
    question = f"Which is {word}, {a} or {b}?"
    answer = max(a, b) if larger else min(a, b)
    return Item((question,), str(answer), "compare", f"{min(a, b)},{max(a, b)}")
