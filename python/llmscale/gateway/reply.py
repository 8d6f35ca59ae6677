"""The answer to one HTTP request: its choices, and the one coroutine that waits for them.

The driver reports each delivery in O(1) and wakes the waiter at most once per wake-up of the front, so a token costs no
task and no future of its own while the waiter is busy writing. Runs on the event loop only; knows nothing of HTTP or of
text.
"""

from __future__ import annotations

import asyncio

from llmscale.choice import Choice
from llmscale.errors import LlmscaleError
from llmscale.types import Usage


class Reply:
    """With `streaming` the waiter wakes for every piece of news, otherwise only at the end."""

    __slots__ = (
        "_loop",
        "_news",
        "_waiter",
        "choices",
        "error",
        "gone",
        "held_bytes",
        "prompt_tokens",
        "remaining",
        "streaming",
    )

    def __init__(self, loop: asyncio.AbstractEventLoop, *, streaming: bool) -> None:
        self._loop = loop
        self._waiter: asyncio.Future[None] | None = None
        self._news = False
        self.streaming = streaming
        self.choices: list[Choice] = []
        self.remaining = 0
        self.prompt_tokens = 0
        # What the driver counts for it until it is abandoned.
        self.held_bytes = 0
        self.error: LlmscaleError | None = None
        # Set when the client has gone away: nobody reads what is written from now on.
        self.gone = False

    @property
    def finished(self) -> bool:
        """Whether nothing more will come."""
        return self.remaining == 0 or self.error is not None or self.gone

    def notify(self) -> None:
        """Says that there is news, and wakes the waiter if it wants to know."""
        if self.streaming or self.finished:
            self._news = True
            waiter = self._waiter
            if waiter is not None and not waiter.done():
                waiter.set_result(None)

    async def wait(self) -> None:
        """Returns when there is news since the last call, at once if there is some already."""
        if not self._news:
            self._waiter = self._loop.create_future()
            await self._waiter
            self._waiter = None
        self._news = False

    def poke(self) -> None:
        """Wakes the waiter without news, so that it can look at the clock."""
        self._news = True
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def usage(self) -> Usage:
        """What the request has cost so far. Choices of one prompt share it, so it counts once."""
        cached: dict[int, int] = {}
        completion_tokens = 0
        for choice in self.choices:
            completion_tokens += choice.output_tokens
            cached[choice.prompt] = max(cached.get(choice.prompt, 0), choice.cached_tokens)
        return Usage(self.prompt_tokens, completion_tokens, sum(cached.values()))
