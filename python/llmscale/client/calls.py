"""One request as the caller stated it, checked once, before a transport sees it. Knows nothing of transports."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmscale.client.wire import CLASSES
from llmscale.errors import ClientTimeout, InvalidField
from llmscale.types import SamplingParams

Message = Mapping[str, Any]
Prompt = str | Sequence[int] | Sequence[Message]


@dataclass(frozen=True, slots=True)
class Call:
    """A prompt (text or ids) or a conversation, and how to run it. `params` None: what the model's author recommends.

    `timeout_seconds` bounds the whole answer. `streaming` says whether anybody looks at it before its end, and
    `parse_special_tokens` whether special tokens that a text prompt spells become their ids. The last two are about
    conversations: whether the template begins an answer, or the model goes on with the last message.
    """

    prompt: str | tuple[int, ...] | None
    messages: tuple[Message, ...] | None
    params: SamplingParams | None
    model: str | None
    priority: str
    timeout_seconds: float | None
    streaming: bool
    parse_special_tokens: bool = False
    add_generation_prompt: bool = True
    continue_final_message: bool = False

    def __post_init__(self) -> None:
        if self.priority not in CLASSES:
            raise InvalidField(
                f"priority is {self.priority!r}, it must be one of {', '.join(CLASSES)}", field="priority"
            )
        if self.timeout_seconds is not None and not self.timeout_seconds > 0:
            raise InvalidField(f"timeout is {self.timeout_seconds}, it must be above 0 seconds", field="timeout")
        if self.prompt is not None and not self.prompt:
            raise InvalidField("prompt is empty, at least 1 token is needed", field="prompt")
        if self.messages is not None and not self.messages:
            raise InvalidField("messages is empty, at least 1 message is needed", field="messages")
        if self.messages is not None and self.parse_special_tokens:
            raise InvalidField(
                "parse_special_tokens is for prompts; in a chat special tokens are the template's, leave it out",
                field="parse_special_tokens",
            )
        if self.messages is None and (self.continue_final_message or not self.add_generation_prompt):
            field = "continue_final_message" if self.continue_final_message else "add_generation_prompt"
            raise InvalidField(f"{field} is for conversations, and this is a prompt; leave it out", field=field)

    @property
    def prompt_text(self) -> str | None:
        """The prompt, if it is a text."""
        return self.prompt if isinstance(self.prompt, str) else None

    def late(self) -> ClientTimeout:
        """The error of an answer that was not there within `timeout_seconds`."""
        return ClientTimeout(
            f"no complete answer within {self.timeout_seconds:g} s (timeout); the request was cancelled"
        )

    @property
    def goes_on(self) -> bool:
        """Whether the answer's text goes on from the prompt's; else it begins a text of its own."""
        return self.messages is None or self.continue_final_message

    @property
    def prompt_ids(self) -> tuple[int, ...]:
        """The prompt, if it is ids."""
        return self.prompt if isinstance(self.prompt, tuple) else ()


def split_input(given: Prompt) -> tuple[str | tuple[int, ...] | None, tuple[Message, ...] | None]:
    """A prompt or a conversation, by its type. Raises InvalidField for anything else."""
    if isinstance(given, str):
        return given, None
    items: tuple[Any, ...] = tuple(given) if isinstance(given, Sequence) else (None,)
    if items and all(isinstance(item, Mapping) for item in items):
        return None, items
    if all(isinstance(item, int) and not isinstance(item, bool) and item >= 0 for item in items):
        return items, None
    raise InvalidField(
        "the input must be a text, a list of token ids, or a list of messages with role and content", field="prompt"
    )
