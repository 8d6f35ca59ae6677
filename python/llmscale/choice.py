"""One sequence of an answer: turns deliveries of ids into text, in the same way for gateway, SDK and offline use.

`Choice.accept` detokenizes each token in O(1), looks for stop strings at exact token positions and collects what a
reader has not taken yet. It belongs to one thread and knows nothing of HTTP, JSON, sockets or of the other choices of
its request.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final, Protocol

from llmscale import errors
from llmscale.stop_strings import StopMatcher
from llmscale.types import Logprob, SamplingParams

if TYPE_CHECKING:
    # A client that reads ids alone has no tokenizer and does not pay for loading the library.
    from llmscale.detokenizer import Detokenizer
    from llmscale.tokenizer import Tokenizer

TokenLogprobs = tuple[int, float, list[tuple[int, float]]]
"""A token, its log probability, and the most likely tokens with theirs."""

ENDED_WELL: Final = frozenset({"stop", "length"})
# A row of log probabilities: a tuple with a list of up to 20 pairs, as CPython holds it.
_LOGPROBS_BYTES: Final = 2_048

_FAILURES: Final[dict[str, tuple[type[errors.LlmscaleError], str]]] = {
    "aborted": (errors.Cancelled, "the request was cancelled"),
    "deadline_exceeded": (
        errors.DeadlineExceeded,
        "the request did not finish within {deadline}; shorten it or retry later",
    ),
    "request_poisoned": (
        errors.RequestPoisoned,
        "the worker died twice while computing this request, it is not tried again",
    ),
    "not_a_number": (errors.NotANumber, "the model returned a value that is not a number for this request"),
    "nothing_to_sample": (
        errors.NothingToSample,
        "every token is suppressed; relax logit_bias, min_tokens or the stop tokens",
    ),
    "unavailable": (errors.Unavailable, "no replica could go on with the request; retry later"),
}


class Delivery(Protocol):
    """What is new of one sequence: tokens in order, and the end if it has ended."""

    @property
    def request(self) -> int: ...
    @property
    def index(self) -> int:
        """Output position of the first token."""

    @property
    def tokens(self) -> Sequence[int]: ...
    @property
    def logprobs(self) -> Sequence[tuple[float, list[tuple[int, float]]]] | None: ...
    @property
    def finish_reason(self) -> str | None: ...
    @property
    def cached_tokens(self) -> int: ...
    @property
    def output_tokens(self) -> int: ...
    @property
    def restarts(self) -> int: ...


def failure(reason: str, deadline: str = "its deadline") -> errors.LlmscaleError:
    """The error that a finish reason other than "stop" and "length" stands for. `deadline` is how long the request had,
    and who says so: whoever made the request knows."""
    kind, message = _FAILURES.get(reason, (errors.RequestFailed, f"the request ended with {reason!r}"))
    return kind(message.replace("{deadline}", deadline))


def ranked(
    token: int, chosen: float, top: Sequence[tuple[int, float]], text_of: Callable[[int], str]
) -> tuple[Logprob, ...]:
    """The row of one output token as applications read it: the drawn token, then the most likely ones, best first."""
    ranks = {other: rank for rank, (other, _) in enumerate(top, start=1)}
    drawn = Logprob(token, chosen, text_of(token), ranks.get(token))
    return (drawn, *(Logprob(other, value, text_of(other), ranks[other]) for other, value in top))


class Choice:
    """The text of one sequence of a request; `prompt` says which of its prompts. `finish_reason` is set at the end.

    `context` are the ids of a prompt that the text goes on from; without any it begins a text of its own.
    """

    __slots__ = (
        "_detokenizer",
        "_eos",
        "_include_stop",
        "_matcher",
        "_min_tokens",
        "_want_logprobs",
        "cached_tokens",
        "finish_reason",
        "index",
        "last_token_at",
        "logprobs",
        "output_tokens",
        "pieces",
        "prompt",
        "request",
        "restarts",
        "started_at",
        "stop_reason",
    )

    def __init__(
        self, index: int, prompt: int, tokenizer: Tokenizer, params: SamplingParams, context: Sequence[int] = ()
    ) -> None:
        self.index = index
        self.prompt = prompt
        self.request: int | None = None
        self.finish_reason: str | None = None
        self.stop_reason: str | int | None = None
        self.output_tokens = 0
        self.cached_tokens = 0
        self.restarts = 0
        self.started_at = 0.0
        self.last_token_at: float | None = None
        self.pieces: list[str] = []
        self.logprobs: list[TokenLogprobs] = []
        self._detokenizer: Detokenizer = tokenizer.detokenizer(
            skip_special_tokens=params.skip_special_tokens, context=context
        )
        self._matcher = (
            StopMatcher(params.stop, include_match=params.include_stop_str_in_output) if params.stop else None
        )
        self._min_tokens = params.min_tokens
        self._include_stop = params.include_stop_str_in_output
        self._eos = frozenset(tokenizer.eos_token_ids)
        self._want_logprobs = params.logprobs is not None

    def accept(self, delivery: Delivery) -> int | None:
        """Takes what is new. Returns the number of output tokens to keep when a stop string ended the text early."""
        tokens = delivery.tokens
        reason = delivery.finish_reason
        if delivery.index != self.output_tokens and tokens:
            raise AssertionError(
                f"token {delivery.index} follows token {self.output_tokens} of request {delivery.request}"
            )
        self.restarts = delivery.restarts
        # Told with the first tokens, and not by everyone with the others.
        self.cached_tokens = max(self.cached_tokens, delivery.cached_tokens)
        if self._want_logprobs and delivery.logprobs is not None:
            self.logprobs += [(token, *row) for token, row in zip(tokens, delivery.logprobs, strict=True)]
        before = self.output_tokens
        self.output_tokens = before + len(tokens)
        shown: Sequence[int] = tokens
        if reason == "stop" and tokens:
            if tokens[-1] not in self._eos:
                self.stop_reason = tokens[-1]
            if not self._include_stop:
                shown = tokens[:-1]
        if self._matcher is not None:
            kept = self._match(before, shown)
            if kept is not None:
                return kept
        else:
            push = self._detokenizer.push
            for token in shown:
                if piece := push(token):
                    self.pieces.append(piece)
        if reason is not None:
            self._finish(reason)
        return None

    def _match(self, before: int, tokens: Sequence[int]) -> int | None:
        matcher = self._matcher
        assert matcher is not None
        for position, token in enumerate(tokens, start=before + 1):
            piece = self._detokenizer.push(token)
            if not piece:
                continue
            # Text made by the first min_tokens tokens cannot end the sequence.
            shown = matcher.push(piece) if position > self._min_tokens else piece
            if shown:
                self.pieces.append(shown)
            if matcher.matched is not None:
                self._stop_at(matcher.matched, position)
                return position
        return None

    def _stop_at(self, stop: str, output_tokens: int) -> None:
        surplus = self.output_tokens - output_tokens
        if surplus and self.logprobs:
            del self.logprobs[-surplus:]
        self.output_tokens = output_tokens
        self.finish_reason, self.stop_reason = "stop", stop

    def _finish(self, reason: str) -> None:
        tail = self._detokenizer.finish()
        matcher = self._matcher
        if matcher is not None:
            tail = matcher.push(tail) if tail else ""
            if matcher.matched is not None:
                reason, self.stop_reason = "stop", matcher.matched
            else:
                tail += matcher.finish()
        if tail:
            self.pieces.append(tail)
        self.finish_reason = reason

    @property
    def waiting_bytes(self) -> int:
        """About how much has not been taken, for the bound on slow readers."""
        return sum(map(len, self.pieces)) + len(self.logprobs) * _LOGPROBS_BYTES

    def take_text(self) -> str:
        """The text since the last call."""
        pieces = self.pieces
        if not pieces:
            return ""
        text = pieces[0] if len(pieces) == 1 else "".join(pieces)
        pieces.clear()
        return text

    def take_logprobs(self) -> list[TokenLogprobs]:
        """The log probabilities since the last call."""
        taken, self.logprobs = self.logprobs, []
        return taken
