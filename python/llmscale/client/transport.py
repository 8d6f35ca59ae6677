"""What the client needs of a transport: starting an answer, models, health, closing. Types only, no behaviour."""

from __future__ import annotations

from typing import Protocol

from llmscale.client.calls import Call
from llmscale.client.results import Assembly, Health, ModelInfo, StreamChunk


class Answer(Protocol):
    """One request under way, owned by one event loop."""

    @property
    def assembly(self) -> Assembly:
        """Where the caller joins the pieces; it knows the prompt, and the usage once the answer has ended."""

    async def next(self) -> list[StreamChunk]:
        """The pieces since the last call, waiting for at least one; nothing at the end. Raises LlmscaleError."""

    def cancel(self) -> None:
        """Ends the request now, without waiting; one that has ended is no error."""


class Transport(Protocol):
    """A way to one server."""

    async def start(self, call: Call) -> Answer:
        """Sends a request. Raises LlmscaleError."""

    async def models(self) -> list[ModelInfo]:
        """What is served."""

    async def health(self) -> Health:
        """How the server is doing."""

    async def close(self) -> None:
        """Ends everything that runs."""
