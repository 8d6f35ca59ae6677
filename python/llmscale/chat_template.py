"""Renders a model's chat template within hard limits.

The template comes from the model's folder and counts as hostile: it runs in a sandbox without access to Python and pays
for its work out of a budget of steps and time, so `{% for i in range(10**9) %}` ends at once, on every machine and
every thread. The cost of a rendering is that of the template plus 0.1 us per charge. Knows nothing of tokens or of
HTTP.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

from jinja2.exceptions import TemplateError

from llmscale.errors import InvalidField, InvalidTokenizer, PromptTemplateError
from llmscale.template_budget import DEFAULT_LIMITS, Budget, TemplateLimits, current_budget
from llmscale.template_sandbox import DEFINED_NAMES, SandboxedTemplates

_SHOWN_CHARACTERS: Final = 64
RESERVED_VARIABLES: Final = DEFINED_NAMES | {
    "messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "chat_template", "tokenize",
}  # fmt: skip
"""Names that mean something to templates or to those who render them, so that no request may give them."""
_MAX_ARGUMENT_LEVELS: Final = 64
_TEXT_PART: Final = '{"type": "text", "text": ...}'
# What a template's own mistakes look like in Python. Anything else is a defect of ours and must surface.
_TEMPLATE_MISTAKES = (
    ArithmeticError,
    AttributeError,
    LookupError,
    NotImplementedError,
    RecursionError,
    TypeError,
    ValueError,
)


class ChatTemplate:
    """One compiled template. Thread-safe after construction.

    Raises `InvalidTokenizer` when the template is too large or does not compile.
    """

    def __init__(self, source: str, *, limits: TemplateLimits = DEFAULT_LIMITS) -> None:
        size = len(source.encode())
        if size > limits.max_template_bytes:
            raise InvalidTokenizer(
                f"the chat template has {size} bytes, the limit is {limits.max_template_bytes}; shorten it"
            )
        self.source = source
        self._limits = limits
        # jinja2 folds constant filters while it compiles, which must not be a way around the budget.
        token = current_budget.set(Budget(limits))
        try:
            self._template = SandboxedTemplates().from_string(source)
        except (TemplateError, PromptTemplateError, SyntaxError, MemoryError, *_TEMPLATE_MISTAKES) as error:
            raise InvalidTokenizer(f"the chat template does not compile: {error}") from error
        finally:
            current_budget.reset(token)

    def render(self, variables: Mapping[str, Any]) -> str:
        """The prompt as text. Raises `PromptTemplateError` when the template refuses or breaks a limit."""
        token = current_budget.set(Budget(self._limits))
        try:
            text = self._template.render(variables)
        except TemplateError as error:
            raise PromptTemplateError(
                f"the chat template refused the messages: {error.message}", field="messages"
            ) from error
        except _TEMPLATE_MISTAKES as error:
            raise PromptTemplateError(
                f"the chat template failed on these messages ({type(error).__name__})", field="messages"
            ) from error
        finally:
            current_budget.reset(token)
        size = len(text.encode(errors="surrogatepass"))
        if size > self._limits.max_output_bytes:
            raise PromptTemplateError(
                f"the rendered prompt has {size} bytes, the limit is {self._limits.max_output_bytes};"
                " shorten the messages",
                field="messages",
            )
        return text


def with_text_contents(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages as templates read them: every content is one text, parts joined by line ends, empty where there is none.

    A template would print a list of parts as Python writes it, and the word None. Arguments of tool calls, which
    OpenAI's schema has as JSON texts, are objects, because templates write them as JSON themselves. Raises InvalidField
    for what is no message, for parts that are no text and for arguments that are no object.
    """
    found: list[dict[str, Any]] = []
    for position, message in enumerate(messages):
        field = f"messages[{position}]"
        if not isinstance(message, Mapping):
            raise InvalidField(
                f"{field} is a {type(message).__name__}, it must be an object with role and content", field=field
            )
        entry = {**message, "content": _text(message.get("content"), f"{field}.content")}
        if calls := entry.get("tool_calls"):
            entry["tool_calls"] = _with_argument_objects(calls, f"{field}.tool_calls")
        else:
            entry.pop("tool_calls", None)
        found.append(entry)
    return found


def _text(content: object, field: str) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list | tuple):
        raise InvalidField(
            f"{field} is a {type(content).__name__}, it must be a text or a list of text parts", field=field
        )
    return "\n".join(_part_text(part, f"{field}[{place}]") for place, part in enumerate(content))


def _part_text(part: object, field: str) -> str:
    if not isinstance(part, Mapping):
        raise InvalidField(f"{field} is a {type(part).__name__}, it must be {_TEXT_PART}", field=field)
    if (kind := part.get("type")) != "text":
        raise InvalidField(
            f"{field} is of type {repr(kind)[:_SHOWN_CHARACTERS]}, only text is served: {_TEXT_PART}", field=field
        )
    if not isinstance(text := part.get("text"), str):
        raise InvalidField(f"{field}.text is a {type(text).__name__}, it must be a text", field=f"{field}.text")
    return text


def _with_argument_objects(calls: object, field: str) -> list[dict[str, Any]]:
    if not isinstance(calls, list | tuple):
        raise InvalidField(f"{field} is a {type(calls).__name__}, it must be a list of tool calls", field=field)
    found: list[dict[str, Any]] = []
    for position, call in enumerate(calls):
        place = f"{field}[{position}]"
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping):
            raise InvalidField(f"{place} must be an object with a function", field=place)
        arguments = _arguments(function.get("arguments"), f"{place}.function.arguments")
        found.append({**call, "function": {**function, "arguments": arguments}})
    return found


def _arguments(given: object, field: str) -> Mapping[str, Any]:
    if not isinstance(given, str):
        given = {} if given is None else given
    else:
        try:
            given = json.loads(given or "{}", parse_constant=_refuse_constant)
        except (ValueError, RecursionError) as error:
            raise InvalidField(f"{field} is not valid JSON", field=field) from error
    if not isinstance(given, Mapping):
        raise InvalidField(f"{field} is a {type(given).__name__}, it must be a JSON object", field=field)
    if not _is_within(given, _MAX_ARGUMENT_LEVELS):
        raise InvalidField(f"{field} is nested deeper than {_MAX_ARGUMENT_LEVELS}", field=field)
    return given


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _is_within(value: object, levels: int) -> bool:
    """Whether a value has at most so many levels of objects and lists."""
    if not isinstance(value, Mapping | list | tuple):
        return True
    inside = value.values() if isinstance(value, Mapping) else value
    return levels > 0 and all(_is_within(one, levels - 1) for one in inside)
