"""Tool calls in the messages of a conversation, as OpenAI's schema has them, with a bound on every field.

They are what a model has asked for before, and reach the chat template like the rest of a message. Knows nothing of
requests.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta

MAX_TOOL_CALLS: Final = 128


class CalledFunction(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A function with its arguments, an object as JSON; an empty text is none."""

    name: Annotated[str, Meta(min_length=1, max_length=256)]
    arguments: str = ""


class ToolCall(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One call. A message of the role `tool` names its `id`."""

    id: Annotated[str, Meta(max_length=512)]
    type: Literal["function"] = "function"
    function: CalledFunction


ToolCalls = Annotated[list[ToolCall], Meta(max_length=MAX_TOOL_CALLS)]


def template_calls(calls: list[ToolCall]) -> list[dict[str, Any]]:
    """The calls as plain objects."""
    return [
        {
            "id": call.id,
            "type": call.type,
            "function": {"name": call.function.name, "arguments": call.function.arguments},
        }
        for call in calls
    ]
