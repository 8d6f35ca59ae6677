"""vLLM's requests for the ids of a text and the text of ids, as typed structs with a bound on every field.

/tokenize takes a prompt or a conversation; which of the two a body is follows from whether it has `messages`, so that
an error names the field of the form that was meant. Linear in the bytes. Knows nothing of tokenizers or of sockets.
"""

from __future__ import annotations

from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta

from llmscale.gateway.openai import MAX_TEXT_CHARACTERS, Message, Name, TokenId, Variables, decoded
from llmscale.gateway.unserved import Nothing

MAX_TOKENS: Final = 1 << 22
"""Ids in a request; what a model takes of them is its own bound."""


class TokenizePromptRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """POST /tokenize with a text. None is as the default that the guide states."""

    prompt: Annotated[str, Meta(max_length=MAX_TEXT_CHARACTERS)]
    model: Name | None = None
    add_special_tokens: bool | None = None
    parse_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class TokenizeChatRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """POST /tokenize with a conversation."""

    messages: Annotated[list[Message], Meta(min_length=1)]
    model: Name | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: Variables | None = None
    return_token_strs: bool | None = None
    # What is not served, with the only value that it may have.
    add_special_tokens: Literal[False] | None = None
    parse_special_tokens: Literal[False] | None = None
    tools: Nothing | None = None
    chat_template: None = None
    mm_processor_kwargs: None = None


class TokenizeResponse(msgspec.Struct, frozen=True):
    """Response of /tokenize. `max_model_len` is the longest sequence in tokens, whatever `count` is."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None
    """As the vocabulary spells them; null unless asked for."""


class DetokenizeRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """POST /detokenize."""

    tokens: Annotated[list[TokenId], Meta(max_length=MAX_TOKENS)]
    model: Name | None = None


class DetokenizeResponse(msgspec.Struct, frozen=True):
    """Response of /detokenize, with the special tokens among the ids spelled out."""

    prompt: str


class _Form(msgspec.Struct):
    """Tells a conversation from a prompt. Empty where the body has no messages."""

    messages: msgspec.Raw = msgspec.Raw()


_form_decoder: Final = msgspec.json.Decoder(_Form)
_prompt_decoder: Final = msgspec.json.Decoder(TokenizePromptRequest)
_chat_decoder: Final = msgspec.json.Decoder(TokenizeChatRequest)
_detokenize_decoder: Final = msgspec.json.Decoder(DetokenizeRequest)


def decode_tokenize(body: bytes) -> TokenizePromptRequest | TokenizeChatRequest:
    """Parses and checks a body. Raises `InvalidField`."""
    if bytes(decoded(_form_decoder, body).messages):
        return decoded(_chat_decoder, body)
    return decoded(_prompt_decoder, body)


def decode_detokenize(body: bytes) -> DetokenizeRequest:
    """Parses and checks a body. Raises `InvalidField`."""
    return decoded(_detokenize_decoder, body)
