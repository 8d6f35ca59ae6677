"""A conversation of a request: what of it is refused, and how chat templates get it.

Linear in the messages, whose number and bytes are bounded. Knows nothing of templates' texts or of ids.
"""

from __future__ import annotations

from collections.abc import Sequence

from llmscale.errors import InvalidField
from llmscale.gateway.openai import ChatRequest, Message, check_format
from llmscale.gateway.tool_calls import template_calls


def check_chat(request: ChatRequest, max_messages: int) -> None:
    """Refuses what is part of OpenAI's API and not served here yet. Raises `InvalidField`."""
    for field in ("tools", "tool_choice", "functions", "function_call"):
        value = getattr(request, field)
        if value is not None and value not in ([], "none"):
            raise InvalidField(f"{field}: tool calls are not supported yet; leave the field out", field=field)
    check_format(request)
    check_messages(request.messages, max_messages)
    if request.top_logprobs and not request.logprobs:
        raise InvalidField("top_logprobs needs logprobs to be true", field="top_logprobs")


def check_messages(messages: Sequence[Message], max_messages: int) -> None:
    """Refuses a conversation that no template could render. Raises `InvalidField`."""
    if len(messages) > max_messages:
        raise InvalidField(f"messages has {len(messages)} entries, the limit is {max_messages}", field="messages")
    for position, message in enumerate(messages):
        if message.function_call:
            field = f"messages[{position}].function_call"
            raise InvalidField(f"{field}: function calls are not supported; send tool_calls", field=field)
        if message.content is None and message.role != "assistant":
            field = f"messages[{position}].content"
            raise InvalidField(f"{field} is missing, a {message.role} message needs one", field=field)


def template_variables(request: ChatRequest) -> dict[str, object]:
    """What the chat template is told beside the messages."""
    variables: dict[str, object] = {}
    if request.reasoning_effort is not None:
        variables["reasoning_effort"] = request.reasoning_effort
    variables.update(request.chat_template_kwargs or {})
    return variables


def template_messages(given: Sequence[Message]) -> list[dict[str, object]]:
    """The messages as the tokenizer takes them, with the fields that chat templates read."""
    messages: list[dict[str, object]] = []
    for message in given:
        content: object = message.content
        if isinstance(content, list):
            content = [{"type": "text", "text": part.text} for part in content]
        entry: dict[str, object] = {"role": message.role, "content": content}
        if message.name is not None:
            entry["name"] = message.name
        if message.tool_calls:
            entry["tool_calls"] = template_calls(message.tool_calls)
        if message.tool_call_id is not None:
            entry["tool_call_id"] = message.tool_call_id
        reasoning = message.reasoning if message.reasoning_content is None else message.reasoning_content
        if reasoning is not None:
            entry["reasoning_content"] = reasoning
        messages.append(entry)
    return messages
