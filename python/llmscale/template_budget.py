"""What a chat template may spend while it renders.

One `Budget` per rendering counts steps (a visited node, a loop iteration, a call, 64 characters) and looks at the
clock. A charge is O(1) and costs 0.1 us; values that nest are measured before they are printed or compared, because a
template can nest a value so that its size doubles with every line. Knows nothing of jinja2's syntax or of messages.
"""

from __future__ import annotations

import time
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Final

import jinja2
from jinja2.exceptions import SecurityError

from llmscale.errors import TemplateLimitReached

_SMALL_SIZE: Final = 4_096
_MAX_NESTING: Final = 64


@dataclass(frozen=True, slots=True)
class TemplateLimits:
    """Bounds of one template and of one rendering."""

    max_template_bytes: int = 1 << 20
    max_output_bytes: int = 8 << 20
    max_items: int = 20_000
    max_steps: int = 1_000_000
    max_render_us: int = 100_000


DEFAULT_LIMITS: Final = TemplateLimits()


class Budget:
    """What is left of one rendering or compilation."""

    __slots__ = ("_deadline_ns", "_limits", "_started_cpu_ns", "_steps")

    def __init__(self, limits: TemplateLimits) -> None:
        self._limits = limits
        self._steps = limits.max_steps
        self._started_cpu_ns = time.thread_time_ns()
        self._deadline_ns = time.perf_counter_ns() + limits.max_render_us * 1_000

    def spend(self, steps: int) -> None:
        """Pays for steps and looks at the clock."""
        self._count(steps)
        # The wall clock costs 40 ns and the thread's CPU clock 300 ns, so the second one is asked only after the first
        # has run out: a thread that merely waited for a core is not at fault.
        now_ns = time.perf_counter_ns()
        if now_ns > self._deadline_ns:
            left_ns = self._limits.max_render_us * 1_000 - (time.thread_time_ns() - self._started_cpu_ns)
            if left_ns <= 0:
                raise TemplateLimitReached(
                    f"the chat template ran for more than {self._limits.max_render_us // 1_000} ms;"
                    " shorten the messages or fix the template"
                )
            self._deadline_ns = now_ns + left_ns

    def reserve(self, characters: int) -> None:
        """Pays for a text of this size before it is made."""
        if characters < _SMALL_SIZE:
            # The loop or macro around it looks at the clock.
            self._count(1 + (characters >> 6))
            return
        if characters > self._limits.max_output_bytes:
            raise TemplateLimitReached(
                f"the chat template makes a text of {characters} characters, the limit is"
                f" {self._limits.max_output_bytes}; shorten the messages or fix the template"
            )
        self.spend(1 + (characters >> 6))

    def reserve_items(self, items: int, *, steps_each: float = 0.0625) -> None:
        """Pays for a list of this length before it is made or walked; copying an item costs a sixteenth of a step."""
        if items > self._limits.max_items:
            raise TemplateLimitReached(
                f"the chat template makes or walks {items} items, the limit is {self._limits.max_items};"
                " shorten the messages or fix the template"
            )
        self.spend(1 + int(items * steps_each))

    def _count(self, steps: int) -> None:
        self._steps -= steps
        if self._steps < 0:
            raise TemplateLimitReached(
                f"the chat template took more than {self._limits.max_steps} steps;"
                " shorten the messages or fix the template"
            )


# Rendering is synchronous and stays on one thread, so the budget belongs to the thread's context.
current_budget: Final[ContextVar[Budget]] = ContextVar("llmscale_template_budget")


def spend(steps: int) -> bool:
    """Pays for steps; true, so that it can stand in a condition."""
    current_budget.get().spend(steps)
    return True


def reserve(value: object) -> None:
    """Pays for a value that is made or walked: a text by characters, a collection by items."""
    if isinstance(value, str):
        current_budget.get().reserve(len(value))
    elif isinstance(value, list | tuple | dict):
        current_budget.get().reserve_items(len(value))


def walk(value: object) -> None:
    """Pays for visiting every item of a value, or every character of a text, one by one."""
    if isinstance(value, str | list | tuple | dict):
        current_budget.get().reserve_items(len(value), steps_each=1)


def sliceable(value: object) -> object:
    """Pays for copying a part of a value."""
    reserve(value)
    return value


def measure(value: object, depth: int = 0) -> int:
    """Characters that a value prints at most, nested ones included; pays for the walk.

    Raises `SecurityError` for what is not data: its text would put an address of this process into the prompt.
    """
    if type(value) is str:
        return len(value)
    if depth > _MAX_NESTING:
        raise TemplateLimitReached(f"a value in the chat template is nested deeper than {_MAX_NESTING}")
    if isinstance(value, dict):
        total = sum(measure(key, depth + 1) + measure(item, depth + 1) for key, item in value.items())
    elif isinstance(value, list | tuple):
        total = sum(measure(item, depth + 1) for item in value)
    elif value is None or isinstance(value, str | int | float | jinja2.Undefined):
        return len(value) if isinstance(value, str) else 8
    else:
        raise SecurityError(f"a value of type {type(value).__name__} is not available in chat templates")
    current_budget.get().spend(1 + (total >> 6))
    return total + 4 * len(value) + 2


def comparable(value: object) -> object:
    """Pays for comparing or hashing a value, which visits what is nested in it."""
    if isinstance(value, list | tuple | dict):
        measure(value)
    return value
