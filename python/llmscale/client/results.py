"""What a client hands out besides `RequestOutput`: pieces of a stream, models, health; and how pieces become a result.

`Assembly` joins the pieces of one request in O(1) per piece (texts are joined once, at the end), for both transports
and both styles. Knows nothing of bytes, sockets or event loops.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from llmscale.types import CompletionOutput, Logprob, RequestOutput, Usage


@dataclass(frozen=True, slots=True)
class StreamChunk:
    """What is new of one choice of a request.

    `text` is what this piece adds. `token_ids` are its ids, empty over HTTP, whose format carries text only. At the end
    of a choice `finish_reason` is "stop" or "length". `restarts` counts the failures that the stream has survived.
    """

    request_id: str
    index: int
    text: str
    token_ids: tuple[int, ...] = ()
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    logprobs: tuple[tuple[Logprob, ...], ...] | None = None
    restarts: int = 0


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """A served model and its longest sequence, prompt and output together."""

    name: str
    max_sequence_tokens: int | None


@dataclass(frozen=True, slots=True)
class Health:
    """How the server is doing: "starting", "ready", "recovering", "draining" or "down", and its load in sequences."""

    state: str
    running: int
    waiting: int
    worker_restarts: int

    @property
    def ready(self) -> bool:
        """Whether a request sent now would be started."""
        return self.state == "ready"


@dataclass(slots=True)
class _Choice:
    texts: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[tuple[Logprob, ...]] = field(default_factory=list)
    has_logprobs: bool = False
    finish_reason: str | None = None
    stop_reason: str | int | None = None


class Assembly:
    """The result of a request, piece by piece."""

    __slots__ = ("_choices", "_prompt", "_prompt_ids", "request_id", "restarts", "usage")

    def __init__(self, prompt: str | None, prompt_ids: tuple[int, ...]) -> None:
        self._prompt = prompt
        self._prompt_ids = prompt_ids
        self._choices: dict[int, _Choice] = {}
        self.request_id = ""
        self.restarts = 0
        self.usage: Usage | None = None

    def add(self, chunk: StreamChunk) -> None:
        """Takes the next piece."""
        choice = self._choices.get(chunk.index)
        if choice is None:
            choice = self._choices[chunk.index] = _Choice()
        self.request_id = chunk.request_id
        if chunk.text:
            choice.texts.append(chunk.text)
        choice.token_ids += chunk.token_ids
        if chunk.logprobs is not None:
            choice.has_logprobs = True
            choice.logprobs += chunk.logprobs
        if chunk.finish_reason is not None:
            choice.finish_reason, choice.stop_reason = chunk.finish_reason, chunk.stop_reason
        self.restarts = max(self.restarts, chunk.restarts)

    def output(self, *, finished: bool) -> RequestOutput:
        """What has come so far."""
        outputs = tuple(
            CompletionOutput(
                index=index,
                text="".join(choice.texts),
                token_ids=tuple(choice.token_ids),
                finish_reason=choice.finish_reason,
                stop_reason=choice.stop_reason,
                logprobs=tuple(choice.logprobs) if choice.has_logprobs else None,
            )
            for index, choice in sorted(self._choices.items())
        )
        made = sum(len(output.token_ids) for output in outputs)
        usage = self.usage if self.usage is not None else Usage(len(self._prompt_ids), made)
        return RequestOutput(self.request_id, self._prompt, self._prompt_ids, outputs, finished, usage)
