"""OpenAI's requests as typed structs, with a bound on every field.

msgspec decodes and checks a body in one pass, linear in its bytes, so a value out of bounds is refused before anything
is allocated for it. Fields of the API that llmscale does not have are listed with the only value that they may take, so
that official clients work and nobody is misled. Knows nothing of ids, of replicas or of sockets.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Final, Literal, TypeVar

import msgspec
from msgspec import UNSET, Meta, UnsetType

from llmscale.errors import InvalidField
from llmscale.gateway.tool_calls import ToolCalls
from llmscale.gateway.unserved import Nothing, UnservedFields, only_value
from llmscale.types import (
    MAX_CHOICES,
    MAX_LOGIT_BIAS,
    MAX_LOGPROBS,
    MAX_OUTPUT_TOKENS,
    MAX_STOP_STRING_BYTES,
    MAX_STOP_STRINGS,
    MAX_STOP_TOKENS,
)

MAX_TEXT_CHARACTERS: Final = 1 << 22
"""Of one prompt."""
_TOKEN_MAX: Final = (1 << 31) - 1
_Request = TypeVar("_Request", bound=msgspec.Struct)

Name = Annotated[str, Meta(min_length=1, max_length=256)]
Label = Annotated[str, Meta(max_length=512)]
TokenId = Annotated[int, Meta(ge=0, le=_TOKEN_MAX)]
Tokens = Annotated[int, Meta(ge=1, le=MAX_OUTPUT_TOKENS)]
StopString = Annotated[str, Meta(min_length=1, max_length=MAX_STOP_STRING_BYTES)]
Stop = StopString | Annotated[list[StopString], Meta(max_length=MAX_STOP_STRINGS)]
Priority = Literal["interactive", "standard", "batch", "background"]
Metadata = Annotated[dict[Annotated[str, Meta(max_length=64)], Label], Meta(max_length=16)]

# `$` alone would let a line end follow. Variables that begin with an underscore are jinja2's own.
Speaker = Annotated[str, Meta(pattern="^[A-Za-z0-9_-]{1,64}$(?!\\n)")]
Variable = Annotated[str, Meta(pattern="^[A-Za-z][A-Za-z0-9_]{0,63}$(?!\\n)")]
Variables = Annotated[dict[Variable, bool | int | float | str | None], Meta(max_length=16)]


class StreamOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Options of a stream. None is as false."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    """The usage so far in every event."""
    include_obfuscation: bool | None = None


class ResponseFormat(msgspec.Struct, frozen=True):
    """How the answer must look; only text for now."""

    type: str


class SamplingFields(UnservedFields, kw_only=True, forbid_unknown_fields=True):
    """What both endpoints share. None means the model's default, then OpenAI's."""

    model: Name
    n: Annotated[int, Meta(ge=1, le=MAX_CHOICES)] | None = None
    temperature: Annotated[float, Meta(ge=0, le=100)] | None = None
    top_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1, le=_TOKEN_MAX)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    presence_penalty: Annotated[float, Meta(ge=-10, le=10)] | None = None
    frequency_penalty: Annotated[float, Meta(ge=-10, le=10)] | None = None
    repetition_penalty: Annotated[float, Meta(ge=0.01, le=100)] | None = None
    seed: Annotated[int, Meta(ge=-(1 << 63), le=(1 << 63) - 1)] | None = None
    stop: Stop | None = None
    stop_token_ids: Annotated[list[TokenId], Meta(max_length=MAX_STOP_TOKENS)] | None = None
    min_tokens: Annotated[int, Meta(ge=0, le=MAX_OUTPUT_TOKENS)] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    logit_bias: (
        Annotated[
            dict[Annotated[str, Meta(pattern="^[0-9]{1,10}$")], Annotated[float, Meta(ge=-1000, le=1000)]],
            Meta(max_length=MAX_LOGIT_BIAS),
        ]
        | None
    ) = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    priority: Priority | None = None
    user: Label | None = None
    metadata: Metadata | None = None
    safety_identifier: Label | None = None
    prompt_cache_key: Label | None = None
    prompt_cache_retention: Label | None = None
    service_tier: Literal["auto", "default"] | None = None
    response_format: ResponseFormat | None = None


# One array type per union: msgspec cannot tell a list of texts from a list of ids by itself, `prompts_of` does.
PromptItem = Annotated[str, Meta(max_length=MAX_TEXT_CHARACTERS)] | TokenId | list[TokenId]


class CompletionRequest(SamplingFields, kw_only=True, forbid_unknown_fields=True):
    """POST /v1/completions."""

    prompt: Annotated[str, Meta(max_length=MAX_TEXT_CHARACTERS)] | list[PromptItem]
    max_tokens: Tokens | None = None
    logprobs: Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)] | None = None
    echo: bool | None = None
    best_of: Annotated[int, Meta(ge=1, le=MAX_CHOICES)] | None = None
    suffix: Literal[""] | None = None
    add_special_tokens: Literal[True] | None = None
    parse_special_tokens: bool | None = None


class TextPart(msgspec.Struct, tag_field="type", tag="text", frozen=True, forbid_unknown_fields=True):
    """A piece of a message's text. Here every prefix is cached, so what a client asks to be cached changes nothing."""

    text: str
    cache_control: dict[str, Any] | None = None


class Message(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One turn of a conversation. Some clients give messages the `type` of a part, or of OpenAI's other interface."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    type: Literal["text", "message"] | None = None
    content: str | list[TextPart] | None = None
    name: Speaker | None = None
    refusal: None = None
    audio: None = None
    annotations: Nothing | None = None
    tool_calls: ToolCalls | None = None
    function_call: Any = None
    tool_call_id: Label | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    """The same under its newer name."""


class ChatRequest(SamplingFields, kw_only=True, forbid_unknown_fields=True):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Meta(min_length=1)]
    max_tokens: Tokens | None = None
    max_completion_tokens: Tokens | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    add_special_tokens: Literal[False] | None = None
    parse_special_tokens: Literal[False] | None = None
    chat_template_kwargs: Variables | None = None
    parallel_tool_calls: bool | None = None
    tools: Any = None
    tool_choice: Any = None
    functions: Any = None
    function_call: Any = None
    modalities: list[Literal["text"]] | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high"] | None = None
    verbosity: Literal["medium"] | None = None
    best_of: Literal[1] | None = None
    echo: Literal[False] | None = None
    prediction: None = None
    audio: None = None
    web_search_options: None = None


class Error(msgspec.Struct, frozen=True):
    """OpenAI's error object. `code` is stable; `param` names the field at fault."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorResponse(msgspec.Struct, frozen=True):
    """Body of every response that is not a success."""

    error: Error


class PromptTokensDetails(msgspec.Struct, frozen=True):
    """Part of the usage."""

    cached_tokens: int


class UsageObject(msgspec.Struct, frozen=True):
    """What a request cost."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class CompletionLogprobs(msgspec.Struct, frozen=True):
    """Parallel lists, one entry per output token."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class CompletionChoice(msgspec.Struct, frozen=True):
    """One answer to one prompt. `stop_reason` is the stop string or stop token id that ended it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: str | None
    stop_reason: str | int | UnsetType | None = UNSET


class Completion(msgspec.Struct, frozen=True):
    """Response of /v1/completions, and each of its stream's chunks."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: UsageObject | None


class TopLogprob(msgspec.Struct, frozen=True):
    """A likely token; `bytes` because a token need not be whole characters."""

    token: str
    logprob: float
    bytes: list[int]


class ChatTokenLogprob(msgspec.Struct, frozen=True):
    """The drawn token with the most likely ones."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct, frozen=True):
    """One entry per output token."""

    content: list[ChatTokenLogprob]


class AnswerMessage(msgspec.Struct, frozen=True):
    """What the model said."""

    role: Literal["assistant"]
    content: str
    refusal: None = None


class ChatChoice(msgspec.Struct, frozen=True):
    """One answer."""

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: str | None
    stop_reason: str | int | UnsetType | None = UNSET


class ChatCompletion(msgspec.Struct, frozen=True):
    """Response of /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: UsageObject


class Delta(msgspec.Struct, frozen=True, omit_defaults=True):
    """What is new of an answer."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChunkChoice(msgspec.Struct, frozen=True):
    """News of one answer."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: str | None
    stop_reason: str | int | UnsetType | None = UNSET


class ChatChunk(msgspec.Struct, frozen=True):
    """One event of a chat stream."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: UsageObject | UnsetType | None = UNSET


class ModelObject(msgspec.Struct, frozen=True):
    """One served model. `max_model_len` is the longest sequence in tokens.

    `root` and `parent` are vLLM's, for a model that is no adapter of another; programs that measure servers read them.
    """

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: None
    max_model_len: int


class ModelList(msgspec.Struct, frozen=True):
    """Response of /v1/models."""

    object: Literal["list"]
    data: list[ModelObject]


_completion_decoder: Final = msgspec.json.Decoder(CompletionRequest)
_chat_decoder: Final = msgspec.json.Decoder(ChatRequest)
_PATH: Final = re.compile(r" - at (?:`key` in )?`\$\.?([^`]*)`$")
_FIELD: Final = re.compile(r"(?:unknown|required) field `([^`]{1,128})`")


def decode_completion(body: bytes) -> CompletionRequest:
    """Parses and checks a body. Raises `InvalidField`."""
    return decoded(_completion_decoder, body)


def decode_chat(body: bytes) -> ChatRequest:
    """Parses and checks a body. Raises `InvalidField`."""
    return decoded(_chat_decoder, body)


def decoded(decoder: msgspec.json.Decoder[_Request], body: bytes) -> _Request:
    """A body as the decoder's struct. Raises `InvalidField`."""
    try:
        return decoder.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _invalid(error, decoder.type) from error


def _invalid(error: Exception, request: type[msgspec.Struct]) -> InvalidField:
    """The same complaint with the name of the field, if it has one, and its only value, if there is only one."""
    text = str(error)
    if not isinstance(error, msgspec.ValidationError):
        what = "is not UTF-8" if isinstance(error, UnicodeDecodeError) else f"is not valid JSON ({text})"
        if isinstance(error, RecursionError):
            what = "is nested too deeply"
        return InvalidField(f"the body {what}")
    path = _PATH.search(text)
    named = _FIELD.search(text)
    place = path[1] if path else ""
    if named:
        place = f"{place}.{named[1]}" if place else named[1]
    message = text[: path.start()] if path else text
    if named is None and (only := only_value(request, place)) is not None:
        message = f"only {only} is served here; leave the field out"
    return InvalidField(f"{place}: {message}" if place else message, field=place[:256] or None)


def prompts_of(prompt: str | list[Any]) -> list[str | list[int]]:
    """The prompts of a request: one text, several texts, one list of ids or several. Raises `InvalidField`."""
    if isinstance(prompt, str):
        return [prompt]
    kinds = set(map(type, prompt))
    if not kinds:
        raise InvalidField("prompt is an empty list, at least one prompt is needed", field="prompt")
    if len(kinds) > 1:
        raise InvalidField("prompt mixes texts and token ids; send one kind", field="prompt")
    return [prompt] if kinds == {int} else prompt


def check_format(request: SamplingFields) -> None:
    """Refuses an answer that must look like anything but text. Raises `InvalidField`."""
    if request.response_format is not None and request.response_format.type != "text":
        raise InvalidField(
            f"response_format {request.response_format.type[:64]!r} is not supported yet; only 'text' is",
            field="response_format",
        )
