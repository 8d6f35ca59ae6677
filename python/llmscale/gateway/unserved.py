"""Fields of OpenAI's and vLLM's APIs that llmscale does not have, with the only value that each may take.

Clients that write out every field with its default work, and one that asks for more is told so instead of being misled.
The value stands in the field's type alone: `only_value` reads it there for the error. O(1); knows nothing of requests.
"""

from __future__ import annotations

import functools
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, inspect

Nothing = Annotated[list[Any], Meta(max_length=0)]


class UnservedFields(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Those of both endpoints."""

    store: Literal[False] | None = None
    # vLLM's.
    spaces_between_special_tokens: Literal[True] | None = None
    truncate_prompt_tokens: None = None
    prompt_logprobs: None = None
    bad_words: Nothing | None = None
    length_penalty: Annotated[float, Meta(ge=1, le=1)] | None = None
    use_beam_search: Literal[False] | None = None
    guided_json: None = None
    guided_regex: None = None
    guided_choice: None = None
    guided_grammar: None = None
    return_token_ids: Literal[False] | None = None
    allowed_token_ids: None = None


@functools.cache
def _only_values(request: type[msgspec.Struct]) -> dict[str, str]:
    found = inspect.type_info(request)
    assert isinstance(found, inspect.StructType)
    values = ((field.encode_name, _only(field.type)) for field in found.fields)
    return {name: value for name, value in values if value is not None}


def _only(kind: inspect.Type) -> str | None:
    match kind:
        case inspect.UnionType(types=(other, inspect.NoneType())):
            return _only(other)
        case inspect.NoneType():
            return "null"
        case inspect.LiteralType(values=(value,)):
            return msgspec.json.encode(value).decode()
        case inspect.ListType(max_length=0):
            return "[]"
        case inspect.FloatType(ge=low, le=high) if low is not None and low == high:
            return str(float(low))
    return None


def only_value(request: type[msgspec.Struct], field: str) -> str | None:
    """The only value of a field beside null, as JSON; None for a field that takes several."""
    return _only_values(request).get(field)
