"""The answer of a node as text, ids and an end: one state per choice, fed with deliveries, without input or output.

With a tokenizer the text of each choice is made as the gateway makes it, stop strings included; without one a stream
carries ids only. O(1) per token. Knows nothing of sockets or of event loops.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from llmscale import errors
from llmscale.choice import ENDED_WELL, Choice, failure, ranked
from llmscale.client import wire
from llmscale.client.calls import Call
from llmscale.client.results import Assembly, StreamChunk
from llmscale.client.session import Delivery
from llmscale.types import SamplingParams, Usage

if TYPE_CHECKING:
    from llmscale.tokenizer import Tokenizer

_TEXT_NEEDED: Final = (
    "text needs the model's tokenizer: give the client tokenizer=, a model folder or the name of an embedded model"
    " such as 'tiny-chat'; or send token ids and read token_ids"
)


class _Sequence:
    """One choice."""

    __slots__ = ("cached_tokens", "choice", "ended", "index", "output_tokens")

    def __init__(self, index: int, choice: Choice | None) -> None:
        self.index = index
        self.choice = choice
        self.output_tokens = 0
        self.cached_tokens = 0
        self.ended = False


class NodeReply:
    """All choices of one request. `error` ends it badly; `finished` says that nothing more will come."""

    def __init__(self, call: Call, limits: wire.NodeLimits, tokenizer: Tokenizer | None, request_id: str) -> None:
        self.prompt = _prompt_ids(call, limits, tokenizer)
        self.params = call.params if call.params is not None else _recommended(call, tokenizer)
        self.error: errors.LlmscaleError | None = None
        self.assembly = Assembly(call.prompt_text, tuple(self.prompt))
        self._max_tokens = _max_tokens(self.params, len(self.prompt), limits.max_sequence_tokens)
        self._eos = frozenset(limits.eos_tokens)
        self._call = call
        self._id = request_id
        self._tokenizer = tokenizer
        self._context = self.prompt if call.goes_on else ()
        self._seed = secrets.randbits(64) if self.params.seed is None else self.params.seed & ((1 << 64) - 1)
        self._sequences: dict[int, _Sequence] = {}
        self._remaining = self.params.n
        self._chunks: list[StreamChunk] = []
        if tokenizer is None and self.params.stop:
            raise errors.InvalidField(f"stop strings: {_TEXT_NEEDED}", field="stop")

    @property
    def finished(self) -> bool:
        """Whether nothing more will come."""
        return self._remaining == 0 or self.error is not None

    @property
    def requests(self) -> list[int]:
        """The requests that have not ended."""
        return [request for request, sequence in self._sequences.items() if not sequence.ended]

    def sampling(self, choice: int) -> tuple[Any, ...]:
        """The wire's sampling record of one choice."""
        return wire.sampling_fields(self.params, seed=self._seed, choice=choice, max_tokens=self._max_tokens)

    def started(self, request: int, index: int) -> None:
        """The request that computes a choice."""
        choice = None if self._tokenizer is None else Choice(index, 0, self._tokenizer, self.params, self._context)
        self._sequences[request] = _Sequence(index, choice)

    def accept(self, delivery: Delivery) -> int | None:
        """Takes what is new. Returns the number of output tokens to keep when a stop string ended a choice early."""
        sequence = self._sequences.get(delivery.request)
        if sequence is None or sequence.ended or self.error is not None:
            return None
        if delivery.failure is not None:
            self.error = delivery.failure
            return None
        before = sequence.output_tokens
        kept = None if sequence.choice is None else sequence.choice.accept(delivery)
        tokens = delivery.tokens if kept is None else delivery.tokens[: kept - before]
        sequence.output_tokens = before + len(tokens)
        sequence.cached_tokens = max(sequence.cached_tokens, delivery.cached_tokens)
        reason = "stop" if kept is not None else delivery.finish_reason
        if reason is not None:
            sequence.ended = True
            self._remaining -= 1
            if reason not in ENDED_WELL:
                # A node has no deadline of its own: its clock was a little faster than the client's.
                is_late = reason == "deadline_exceeded" and self._call.timeout_seconds is not None
                self.error = self._call.late() if is_late else failure(reason)
                return kept
        self._chunks.append(self._chunk(sequence, tokens, delivery, reason))
        if self._remaining == 0:
            self.assembly.usage = self._usage()
        return kept

    def take(self) -> list[StreamChunk]:
        """The pieces since the last call."""
        taken, self._chunks = self._chunks, []
        return taken

    def _chunk(self, sequence: _Sequence, tokens: Sequence[int], delivery: Delivery, reason: str | None) -> StreamChunk:
        choice = sequence.choice
        stop_reason: str | int | None = None
        if choice is not None:
            reason, stop_reason = choice.finish_reason, choice.stop_reason
            choice.logprobs.clear()
        elif reason == "stop" and tokens and tokens[-1] not in self._eos:
            stop_reason = tokens[-1]
        logprobs = None
        if self.params.logprobs is not None:
            rows = zip(tokens, delivery.logprobs or (), strict=False)
            logprobs = tuple(ranked(token, *row, self._text_of) for token, row in rows)
        return StreamChunk(
            request_id=self._id,
            index=sequence.index,
            text="" if choice is None else choice.take_text(),
            token_ids=tuple(tokens),
            finish_reason=reason,
            stop_reason=stop_reason,
            logprobs=logprobs,
            restarts=delivery.restarts,
        )

    def _text_of(self, token: int) -> str:
        return "" if self._tokenizer is None else self._tokenizer.decode([token], skip_special_tokens=False)

    def _usage(self) -> Usage:
        made = sum(sequence.output_tokens for sequence in self._sequences.values())
        cached = max(sequence.cached_tokens for sequence in self._sequences.values())
        return Usage(len(self.prompt), made, cached)


def _prompt_ids(call: Call, limits: wire.NodeLimits, tokenizer: Tokenizer | None) -> list[int]:
    if isinstance(call.prompt, tuple):
        largest = max(call.prompt)
        if largest >= limits.vocabulary:
            raise errors.InvalidField(
                f"prompt has the token id {largest}, the vocabulary is {limits.vocabulary}", field="prompt"
            )
        return list(call.prompt)
    if tokenizer is None:
        field = "messages" if call.messages is not None else "prompt"
        raise errors.InvalidField(f"{field}: {_TEXT_NEEDED}", field=field)
    if call.messages is not None:
        return tokenizer.encode_chat(
            call.messages,
            add_generation_prompt=call.add_generation_prompt,
            continue_final_message=call.continue_final_message,
            max_tokens=limits.max_sequence_tokens,
        )
    assert call.prompt is not None, "a call has a prompt or messages"
    return tokenizer.encode(
        call.prompt, max_tokens=limits.max_sequence_tokens, parse_special_tokens=call.parse_special_tokens
    )


def _recommended(call: Call, tokenizer: Tokenizer | None) -> SamplingParams:
    """What the model's author recommends; a chat answers until it ends by itself, as over HTTP."""
    most = None if call.messages is not None else 16
    if tokenizer is None:
        return SamplingParams(max_tokens=most)
    author = tokenizer.generation_defaults
    return SamplingParams(
        max_tokens=most,
        temperature=1.0 if author.temperature is None else author.temperature,
        top_p=1.0 if author.top_p is None else author.top_p,
        top_k=author.top_k or 0,
        min_p=author.min_p or 0.0,
        repetition_penalty=1.0 if author.repetition_penalty is None else author.repetition_penalty,
    )


def _max_tokens(params: SamplingParams, prompt_tokens: int, max_sequence_tokens: int) -> int:
    room = max_sequence_tokens - prompt_tokens
    wanted = max(room, 1) if params.max_tokens is None else params.max_tokens
    if wanted > room:
        raise errors.RequestTooLong.beyond(
            max_sequence_tokens,
            f"the request needs {prompt_tokens} for the prompt and {wanted} for the answer",
            "shorten the prompt or lower max_tokens",
        )
    return wanted
