"""How a conversation becomes text and token ids, once for training, tests and the exported folder.

The format is ChatML-like: `<|im_start|>role`, newline, text, `<|im_end|>`, newline. The Jinja template here and
`encode_item` must agree; a test renders both. Cost is linear in the text. Knows nothing of tasks or batches.
"""

from dataclasses import dataclass

from tokenizers import Tokenizer

from llmscale.embedded.tasks.item import Item

END_OF_TEXT, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = (END_OF_TEXT, START, END)
END_OF_TEXT_ID, START_ID, END_ID = 0, 1, 2

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token ids of a prompt, ending with the assistant's header, and of its answer, ending with `<|im_end|>`."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]


class ChatEncoder:
    """Encodes items; the fixed headers are encoded once, which halves the work of short turns."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._newline = self.ids("\n")
        self._headers = {role: (START_ID, *self.ids(role + "\n")) for role in ("user", "assistant")}

    def ids(self, text: str) -> tuple[int, ...]:
        return tuple(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def item(self, item: Item) -> Encoded:
        prompt: list[int] = []
        for place, turn in enumerate(item.turns):
            prompt += self._headers["user" if place % 2 == 0 else "assistant"]
            prompt += self.ids(turn)
            prompt += (END_ID, *self._newline)
        prompt += self._headers["assistant"]
        return Encoded(tuple(prompt), (*self.ids(item.answer), END_ID))

    @property
    def newline(self) -> tuple[int, ...]:
        """What follows `<|im_end|>` when a conversation goes on."""
        return self._newline
