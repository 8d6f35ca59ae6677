"""The last message of a conversation left open, so that the model goes on with it instead of answering.

As transformers does it: a word that nothing else can hold is put behind the message's text, the template renders it
with the rest, and what it has written is cut where the word stands. O(text). Knows neither templates nor tokens.
"""

from __future__ import annotations

import secrets
import string
from collections.abc import Mapping, Sequence
from typing import Any, Final

from llmscale.errors import InvalidField, PromptTemplateError

_WORD_LETTERS: Final = 24


class FinalMessage:
    """The end of one conversation whose contents are texts, for one rendering."""

    __slots__ = ("_text", "_word", "messages")

    def __init__(self, messages: Sequence[Mapping[str, Any]]) -> None:
        *before, last = messages
        self._text: str = last["content"]
        # Capital letters alone, so that filters which look for digits, spaces or markup pass over it.
        self._word = "".join(secrets.choice(string.ascii_uppercase) for _ in range(_WORD_LETTERS))
        self.messages = [*before, {**last, "content": f"{self._text}{self._word} "}]
        """What the template gets in place of the messages."""

    def cut(self, rendered: str) -> str:
        """What the template has written, up to the end of the message's text.

        Raises `PromptTemplateError` where that text does not stand there, up to the spaces around it.
        """
        before, word, behind = rendered.rpartition(self._word)
        if not word or not before.rstrip().endswith(self._text.strip()):
            raise PromptTemplateError(
                "the chat template leaves out or changes the text of the last message, so the model cannot go on with"
                " it; leave continue_final_message out, or send a text that the template keeps",
                field="messages",
            )
        # A template that trims the message has taken the space behind the word, and would have taken those before it.
        return before if behind.startswith(" ") else before.rstrip()


def check_continued(messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool) -> None:
    """Raises `InvalidField` for a conversation that cannot be gone on with."""
    if add_generation_prompt:
        raise InvalidField(
            "continue_final_message and add_generation_prompt cannot both be true: the first goes on with the last"
            " message, the second begins another one; set add_generation_prompt to false",
            field="add_generation_prompt",
        )
    content = messages[-1].get("content") if messages and isinstance(messages[-1], Mapping) else None
    if not content and content != "":
        raise InvalidField(
            "the last message has no text to go on with; give it one, or leave continue_final_message out",
            field="messages",
        )
