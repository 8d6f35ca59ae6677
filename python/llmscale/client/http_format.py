"""OpenAI's HTTP format, the client's half: bodies of requests, responses, server-sent events, errors.

Bytes in, typed values out, without input or output; linear in the bytes. Responses are decoded by msgspec against the
few fields that are read, so a server that answers something else gives a TransportError and never a half-filled result.
Knows nothing of sockets or of event loops.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, Final, TypeVar

import msgspec

from llmscale import errors
from llmscale.client.calls import Call
from llmscale.client.results import Assembly, Health, ModelInfo, StreamChunk
from llmscale.types import Logprob, SamplingParams, Usage

MAX_EVENT_BYTES: Final = 16 << 20
_ENDED_WELL: Final = ("stop", "length")
_DATA: Final = b"data:"
_DONE: Final = b"[DONE]"
# As our gateways write it; a proxy's comment that only begins like it is a comment.
_RESTARTS: Final = re.compile(rb": restarts ([0-9]{1,9})")
_SHOWN_BODY_CHARACTERS: Final = 200
# Objects of other types, halves of characters (lone surrogates), lists that hold themselves.
_UNWRITABLE: Final = (TypeError, ValueError, OverflowError, RecursionError)
_T = TypeVar("_T")


class _PromptDetails(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int
    prompt_tokens_details: _PromptDetails | None = None


class _TopLogprob(msgspec.Struct):
    token: str
    logprob: float
    bytes: list[int] | None = None


class _ChatLogprob(msgspec.Struct):
    token: str
    logprob: float
    bytes: list[int] | None = None
    top_logprobs: list[_TopLogprob] = []


class _Logprobs(msgspec.Struct):
    """Either endpoint's: parallel lists for completions, `content` for chats."""

    content: list[_ChatLogprob] | None = None
    tokens: list[str] | None = None
    token_logprobs: list[float | None] | None = None
    top_logprobs: list[dict[str, float] | None] | None = None


class _Text(msgspec.Struct):
    content: str | None = None


class _Choice(msgspec.Struct):
    """Either endpoint's, whole or a piece: `text`, `message` or `delta` holds the text."""

    index: int
    text: str | None = None
    message: _Text | None = None
    delta: _Text | None = None
    logprobs: _Logprobs | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None


class _Error(msgspec.Struct):
    message: str
    code: str | int | None = None
    param: str | None = None


class _Response(msgspec.Struct):
    """A response or an event; an event that carries `error` ends its stream."""

    id: str | None = None
    choices: list[_Choice] | None = None
    usage: _Usage | None = None
    error: _Error | None = None


class _Model(msgspec.Struct):
    id: str
    max_model_len: int | None = None


class _Models(msgspec.Struct):
    data: list[_Model]


class _Replica(msgspec.Struct):
    running: int
    waiting: int
    worker_restarts: int


class _Fleet(msgspec.Struct):
    state: str
    queued_requests: int
    replicas: list[_Replica]


_response: Final = msgspec.json.Decoder(_Response)
_models: Final = msgspec.json.Decoder(_Models)
_fleet: Final = msgspec.json.Decoder(_Fleet)


def _decode(decoder: msgspec.json.Decoder[_T], body: bytes) -> _T:
    try:
        return decoder.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise errors.TransportError(f"the server's answer is not in OpenAI's format: {error}") from error


def models(body: bytes) -> list[ModelInfo]:
    """Response of /v1/models."""
    return [ModelInfo(model.id, model.max_model_len) for model in _decode(_models, body).data]


def health(body: bytes) -> Health:
    """Response of /fleet."""
    fleet = _decode(_fleet, body)
    return Health(
        fleet.state,
        sum(replica.running for replica in fleet.replicas),
        fleet.queued_requests + sum(replica.waiting for replica in fleet.replicas),
        sum(replica.worker_restarts for replica in fleet.replicas),
    )


def path_of(call: Call) -> str:
    """The endpoint of a call."""
    return "/v1/completions" if call.messages is None else "/v1/chat/completions"


def request_body(call: Call, model: ModelInfo) -> bytes:
    """The JSON of a call. Raises InvalidField for what the format cannot say."""
    body: dict[str, Any] = {"model": model.name}
    if call.messages is not None:
        body["messages"] = call.messages
        if not call.add_generation_prompt:
            body["add_generation_prompt"] = False
        if call.continue_final_message:
            body["continue_final_message"] = True
    else:
        body["prompt"] = call.prompt
    if call.parse_special_tokens and call.prompt_text is not None:
        body["parse_special_tokens"] = True
    if call.streaming:
        body["stream"] = True
        body["stream_options"] = {"include_usage": True}
    if call.priority != "standard":
        body["priority"] = call.priority
    if call.params is not None:
        body |= _sampling(call, call.params, model)
    return _encode(body)


def _encode(body: dict[str, Any]) -> bytes:
    try:
        return msgspec.json.encode(body)
    except _UNWRITABLE as unwritable:
        for name, value in body.items():
            try:
                msgspec.json.encode(value)
            except _UNWRITABLE as error:
                raise errors.InvalidField(f"{name} cannot be written as JSON: {error}", field=name) from error
        raise errors.InvalidField(f"the request cannot be written as JSON: {unwritable}") from unwritable


def _sampling(call: Call, params: SamplingParams, model: ModelInfo) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "temperature": params.temperature,
        "top_p": params.top_p,
        "top_k": params.top_k,
        "min_p": params.min_p,
        "repetition_penalty": params.repetition_penalty,
    }
    usual = SamplingParams()
    for name in (
        "n",
        "presence_penalty",
        "frequency_penalty",
        "min_tokens",
        "ignore_eos",
        "skip_special_tokens",
        "include_stop_str_in_output",
    ):
        if (value := getattr(params, name)) != getattr(usual, name):
            fields[name] = value
    if params.seed is not None:
        # JSON seeds have 64 signed bits; the server takes them modulo 2^64, so this is the same seed.
        fields["seed"] = params.seed - (1 << 64) if params.seed >= 1 << 63 else params.seed
    if params.stop:
        fields["stop"] = params.stop
    if params.stop_token_ids:
        fields["stop_token_ids"] = params.stop_token_ids
    if params.logit_bias:
        fields["logit_bias"] = {str(token): bias for token, bias in params.logit_bias}
    if call.messages is not None:
        if params.max_tokens is not None:
            fields["max_completion_tokens"] = params.max_tokens
        if params.logprobs is not None:
            fields |= {"logprobs": True, "top_logprobs": params.logprobs}
        return fields
    if params.logprobs is not None:
        fields["logprobs"] = params.logprobs
    fields["max_tokens"] = _completion_tokens(call, params, model)
    return fields


def _completion_tokens(call: Call, params: SamplingParams, model: ModelInfo) -> int:
    if params.max_tokens is not None:
        return params.max_tokens
    if not isinstance(call.prompt, tuple) or model.max_sequence_tokens is None:
        # The completions endpoint reads an absent limit as 16.
        raise errors.InvalidField(
            "max_tokens None needs a prompt of token ids or a chat over HTTP; give a number", field="max_tokens"
        )
    return max(1, model.max_sequence_tokens - len(call.prompt))


class EventDecoder:
    """Splits a server-sent event stream into payloads of `data:` lines and comments, however its bytes are cut."""

    __slots__ = ("_rest",)

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> Iterator[bytes]:
        """The lines that are complete now, without their line ends; only those that carry something."""
        data = self._rest + data if self._rest else data
        lines = data.split(b"\n")
        self._rest = lines.pop()
        if len(self._rest) > MAX_EVENT_BYTES:
            raise errors.TransportError(f"the server sent an event of over {MAX_EVENT_BYTES} bytes")
        for line in lines:
            if line := line.rstrip(b"\r"):
                yield line


class HttpReply:
    """The pieces of one response, whole or streamed."""

    def __init__(self, call: Call) -> None:
        self.assembly = Assembly(call.prompt_text, call.prompt_ids)
        self.done = False
        self._ended: set[int] = set()
        self._choices = 1 if call.params is None else call.params.n
        self._top = None if call.params is None else call.params.logprobs
        self._events = EventDecoder()
        self._restarts = 0

    def feed(self, data: bytes) -> list[StreamChunk]:
        """The pieces that are complete with these bytes of a stream. Raises the error that the server reports."""
        chunks: list[StreamChunk] = []
        for line in self._events.feed(data):
            if line.startswith(_DATA):
                payload = line[len(_DATA) :].strip()
                if payload == _DONE:
                    self._end()
                else:
                    chunks += self._take(payload)
            elif restarts := _RESTARTS.fullmatch(line):
                self._restarts = int(restarts[1])
        return chunks

    def whole(self, body: bytes) -> list[StreamChunk]:
        """The pieces of a response that is not a stream: one per choice."""
        chunks = self._take(body)
        self._end()
        return chunks

    def _take(self, body: bytes) -> list[StreamChunk]:
        response = _decode(_response, body)
        if response.error is not None:
            raise _typed(response.error, 500, None)
        if response.usage is not None:
            details = response.usage.prompt_tokens_details
            cached = 0 if details is None else details.cached_tokens or 0
            self.assembly.usage = Usage(response.usage.prompt_tokens, response.usage.completion_tokens, cached)
        return [self._chunk(response.id or "", choice) for choice in response.choices or ()]

    def _chunk(self, request_id: str, choice: _Choice) -> StreamChunk:
        text = choice.text
        for part in (choice.message, choice.delta):
            if part is not None:
                text = part.content
        if choice.finish_reason is not None:
            if choice.finish_reason not in _ENDED_WELL:
                raise errors.RequestFailed(f"the request ended with {choice.finish_reason!r}")
            self._ended.add(choice.index)
        return StreamChunk(
            request_id=request_id,
            index=choice.index,
            text=text or "",
            finish_reason=choice.finish_reason,
            stop_reason=choice.stop_reason,
            logprobs=None if choice.logprobs is None else tuple(_logprobs(choice.logprobs, self._top)),
            restarts=self._restarts,
        )

    def _end(self) -> None:
        if len(self._ended) != self._choices:
            raise errors.TransportError(f"the answer ended with {len(self._ended)} of {self._choices} choices complete")
        self.done = True


def _logprobs(given: _Logprobs, most: int | None) -> Iterator[tuple[Logprob, ...]]:
    for entry in given.content or ():
        ranked = list(enumerate(entry.top_logprobs, start=1))
        # Parts of characters all read as the replacement character: where there are bytes, they tell tokens apart.
        rank = next((rank for rank, top in ranked if (top.token, top.bytes) == (entry.token, entry.bytes)), None)
        drawn = Logprob(None, entry.logprob, entry.token, rank)
        yield (drawn, *(Logprob(None, top.logprob, top.token, rank) for rank, top in ranked))
    tokens, values = given.tokens or (), given.token_logprobs or ()
    likely = given.top_logprobs or [None] * len(tokens)
    if not len(tokens) == len(values) == len(likely):
        raise errors.TransportError("the lists of the server's log probabilities are not of one length")
    for token, value, tops in zip(tokens, values, likely, strict=True):
        best = list((tops or {}).items())
        if most is not None and len(best) > most:
            # One more than was asked for: the drawn token, which is none of the likeliest and has no rank.
            best = [(text, chance) for text, chance in best if text != token]
        ranks = {text: rank for rank, (text, _) in enumerate(best, start=1)}
        drawn = Logprob(None, 0.0 if value is None else value, token, ranks.get(token))
        yield (drawn, *(Logprob(None, chance, text, ranks[text]) for text, chance in best))


def error_of(status: int, headers: Mapping[str, str], body: bytes) -> errors.LlmscaleError:
    """The error of a response that is not a success: typed by its `code` where the server is ours."""
    try:
        found = _response.decode(body).error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        found = None
    if found is None:
        shown = body[:_SHOWN_BODY_CHARACTERS].decode(errors="replace")
        return errors.TransportError(f"the server answered HTTP {status} without an error object: {shown!r}")
    return _typed(found, status, headers.get("retry-after"))


def _typed(found: _Error, status: int, retry_after: str | None) -> errors.LlmscaleError:
    kind = _kinds().get(str(found.code))
    if kind is errors.Overloaded or (kind is None and status == 429):
        seconds = float(retry_after) if retry_after is not None and retry_after.isdecimal() else 1.0
        return errors.Overloaded(found.message, retry_after_seconds=seconds)
    if kind is None:
        kind = errors.RequestError if 400 <= status < 500 else errors.RequestFailed
    if issubclass(kind, errors.RequestError):
        error: errors.LlmscaleError = kind(found.message, field=found.param)
    else:
        error = kind(found.message)
    if found.code is not None:
        error.code = str(found.code)
    return error


def _kinds() -> dict[str, type[errors.LlmscaleError]]:
    kinds: dict[str, type[errors.LlmscaleError]] = {}
    pending: list[type[errors.LlmscaleError]] = [errors.LlmscaleError]
    while pending:
        kind = pending.pop()
        # Only this tree's own classes: a gateway in the same process adds some that other programs do not have.
        if kind.__module__ == errors.__name__:
            kinds.setdefault(kind.code, kind)
            pending += kind.__subclasses__()
    return kinds
