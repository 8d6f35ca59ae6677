"""Responses in OpenAI's format, whole and as the events of a stream.

The JSON around a piece of text is the same for every event of one choice, so it is made once per choice and an event
costs the encoding of its text (0.1 us) and one join. Events with log probabilities are built from the schema's structs.
Knows nothing of sockets or of when an event is due.
"""

from __future__ import annotations

import codecs
import time
from typing import Final, Protocol

import msgspec

from llmscale.choice import ENDED_WELL, Choice, TokenLogprobs
from llmscale.gateway import openai
from llmscale.gateway.reply import Reply
from llmscale.tokenizer import Tokenizer
from llmscale.types import Usage

_json = msgspec.json.Encoder()
DONE: Final = b"data: [DONE]\n\n"


def usage_object(usage: Usage) -> openai.UsageObject:
    """The usage as OpenAI writes it."""
    return openai.UsageObject(
        usage.prompt_tokens,
        usage.completion_tokens,
        usage.total_tokens,
        openai.PromptTokensDetails(usage.cached_tokens),
    )


def _text_of(tokenizer: Tokenizer, token: int) -> tuple[str, list[int]]:
    content = tokenizer.token_bytes(token)
    return content.decode(errors="replace"), list(content)


def _chat_logprobs(tokenizer: Tokenizer, rows: list[TokenLogprobs], top: int) -> openai.ChatLogprobs:
    content = []
    for token, value, likely in rows:
        text, raw = _text_of(tokenizer, token)
        best = [openai.TopLogprob(*_with_bytes(tokenizer, other, other_value)) for other, other_value in likely[:top]]
        content.append(openai.ChatTokenLogprob(text, _finite(value), raw, best))
    return openai.ChatLogprobs(content)


def _with_bytes(tokenizer: Tokenizer, token: int, value: float) -> tuple[str, float, list[int]]:
    text, raw = _text_of(tokenizer, token)
    return text, _finite(value), raw


def _finite(value: float) -> float:
    # JSON has no infinity; a suppressed token's log probability is written as OpenAI does.
    return max(value, -9999.0)


def _name_of(content: bytes) -> str:
    """A token where its text is all that names it; one that is part of a character by its bytes, as OpenAI does."""
    try:
        return content.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)


class _Offsets:
    """Where tokens begin in the text, which has a character when its last byte has come."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._at = 0

    def of(self, content: bytes) -> int:
        at = self._at
        self._at += len(self._decoder.decode(content))
        return at


def _completion_logprobs(
    tokenizer: Tokenizer, rows: list[TokenLogprobs], top: int, offsets: _Offsets
) -> openai.CompletionLogprobs:
    """The parallel lists. The drawn token is named with the likeliest ones, last where it is none of them."""
    tokens, values, best, begins = [], [], [], []
    for token, value, likely in rows:
        content = tokenizer.token_bytes(token)
        name = _name_of(content)
        tokens.append(name)
        values.append(_finite(value))
        named = {_name_of(tokenizer.token_bytes(other)): _finite(chance) for other, chance in likely[:top]}
        named.setdefault(name, _finite(value))
        best.append(named)
        begins.append(offsets.of(content))
    return openai.CompletionLogprobs(tokens, values, best, begins)


class Format(Protocol):
    """How one endpoint writes its answers."""

    include_usage: bool
    continuous_usage: bool

    def count(self, usage: Usage) -> None:
        """What the next events say of the usage, where every event says it."""

    def begin(self, choice: Choice) -> bytes:
        """The first event of a choice, if the endpoint has one."""

    def news(self, choice: Choice) -> bytes:
        """The event for what a choice has not shown yet; empty when there is nothing to show."""

    def usage(self, usage: Usage) -> bytes:
        """The event with the usage."""

    def whole(self, reply: Reply) -> bytes:
        """The response that is not a stream."""


class _Events:
    """What both formats share: the constant parts of every event."""

    def __init__(
        self, response_id: str, kind: str, model: str, *, options: openai.StreamOptions, logprobs: int | None
    ) -> None:
        self.id = response_id
        self.model = model
        self.created = int(time.time())
        self.include_usage = bool(options.include_usage)
        self.continuous_usage = bool(options.continuous_usage_stats)
        self._logprobs = logprobs
        self._head = b'data: {"id":%b,"object":"%b","created":%d,"model":%b,"choices":[' % (
            _json.encode(response_id),
            kind.encode(),
            self.created,
            _json.encode(model),
        )
        # Every event but the last says "usage": null when the usage was asked for, as OpenAI's do.
        self._tail = b'}],"usage":null}\n\n' if self.include_usage else b"}]}\n\n"
        self._ended: set[int] = set()

    def count(self, usage: Usage) -> None:
        """What the next events say of the usage, where every event says it."""
        self._tail = b'}],"usage":%b}\n\n' % _json.encode(usage_object(usage))

    def usage(self, usage: Usage) -> bytes:
        """The event with the usage."""
        return b'%b],"usage":%b}\n\n' % (self._head, _json.encode(usage_object(usage)))

    def _end_of(self, choice: Choice) -> bytes | None:
        """The end of a choice as JSON members, once."""
        # Other reasons are failures: an error event follows, and clients must not take the text for an answer.
        if choice.finish_reason not in ENDED_WELL or choice.index in self._ended:
            return None
        self._ended.add(choice.index)
        return b'"finish_reason":"%b","stop_reason":%b' % (
            choice.finish_reason.encode(),
            _json.encode(choice.stop_reason),
        )


class CompletionFormat(_Events):
    """/v1/completions."""

    def __init__(
        self,
        response_id: str,
        model: str,
        *,
        tokenizer: Tokenizer,
        options: openai.StreamOptions,
        logprobs: int | None,
        echoes: list[bytes] | None,
    ) -> None:
        """`echoes` are the prompts as texts in JSON, when they are to be repeated."""
        super().__init__(response_id, "text_completion", model, options=options, logprobs=logprobs)
        self._tokenizer = tokenizer
        self._echoes = echoes
        self._offsets: dict[int, _Offsets] = {}

    def begin(self, choice: Choice) -> bytes:
        """The prompt, when it is to be repeated."""
        if self._echoes is None:
            return b""
        return b'%b{"index":%d,"text":%b,"logprobs":null,"finish_reason":null%b' % (
            self._head,
            choice.index,
            self._echoes[choice.prompt],
            self._tail,
        )

    def news(self, choice: Choice) -> bytes:
        """An event with the new text, the new log probabilities and the end."""
        text = choice.take_text()
        end = self._end_of(choice)
        if not text and end is None and not choice.logprobs:
            return b""
        logprobs = b"null"
        if self._logprobs is not None:
            offsets = self._offsets.setdefault(choice.index, _Offsets())
            rows = _completion_logprobs(self._tokenizer, choice.take_logprobs(), self._logprobs, offsets)
            logprobs = _json.encode(rows)
        return b'%b{"index":%d,"text":%b,"logprobs":%b,%b%b' % (
            self._head,
            choice.index,
            _json.encode(text),
            logprobs,
            end or b'"finish_reason":null',
            self._tail,
        )

    def whole(self, reply: Reply) -> bytes:
        """The response that is not a stream."""
        choices = []
        for choice in reply.choices:
            text = choice.take_text()
            if self._echoes is not None:
                text = msgspec.json.decode(self._echoes[choice.prompt]) + text
            logprobs = None
            if self._logprobs is not None:
                rows, offsets = choice.take_logprobs(), _Offsets()
                logprobs = _completion_logprobs(self._tokenizer, rows, self._logprobs, offsets)
            choices.append(
                openai.CompletionChoice(choice.index, text, logprobs, choice.finish_reason, choice.stop_reason)
            )
        usage = usage_object(reply.usage())
        return _json.encode(openai.Completion(self.id, "text_completion", self.created, self.model, choices, usage))


class ChatFormat(_Events):
    """/v1/chat/completions."""

    def __init__(
        self, response_id: str, model: str, *, tokenizer: Tokenizer, options: openai.StreamOptions, logprobs: int | None
    ) -> None:
        super().__init__(response_id, "chat.completion.chunk", model, options=options, logprobs=logprobs)
        self._tokenizer = tokenizer

    def begin(self, choice: Choice) -> bytes:
        """The event that says who speaks."""
        return b'%b{"index":%d,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null%b' % (
            self._head,
            choice.index,
            self._tail,
        )

    def news(self, choice: Choice) -> bytes:
        """An event with the new text, the new log probabilities and the end."""
        text = choice.take_text()
        end = self._end_of(choice)
        if not text and end is None and not choice.logprobs:
            return b""
        logprobs = b"null"
        if self._logprobs is not None:
            logprobs = _json.encode(_chat_logprobs(self._tokenizer, choice.take_logprobs(), self._logprobs))
        return b'%b{"index":%d,"delta":%b,"logprobs":%b,%b%b' % (
            self._head,
            choice.index,
            b'{"content":%b}' % _json.encode(text) if text else b"{}",
            logprobs,
            end or b'"finish_reason":null',
            self._tail,
        )

    def whole(self, reply: Reply) -> bytes:
        """The response that is not a stream."""
        choices = []
        for choice in reply.choices:
            logprobs = None
            if self._logprobs is not None:
                logprobs = _chat_logprobs(self._tokenizer, choice.take_logprobs(), self._logprobs)
            message = openai.AnswerMessage("assistant", choice.take_text())
            choices.append(openai.ChatChoice(choice.index, message, logprobs, choice.finish_reason, choice.stop_reason))
        usage = usage_object(reply.usage())
        return _json.encode(openai.ChatCompletion(self.id, "chat.completion", self.created, self.model, choices, usage))
