"""Texts to calibrate with and items to grade, from a file of JSON lines or from the embedded model's own questions.

A line is an object: {"text"}, {"prompt", "answer"} (or "completion"), or {"messages"} with the answer as last message
or beside it. Files, lines and their number are bounded, every mistake is named with its line. Linear in the file. It
knows token ids only through a tokenizer, and no models.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from llmscale.embedded.tasks import Item
from llmscale.errors import ConfigError

MAX_FILE_BYTES = 1 << 30
MAX_LINE_BYTES = 4 << 20
MAX_LINES = 1_000_000
MAX_MESSAGES = 1_024
FORMS = '{"text"}, {"prompt", "answer"} or {"messages"}'


@dataclass(frozen=True, slots=True)
class Sample:
    """One text: a plain prompt or the messages of a chat, and the answer to it. Without an answer all of it is scored
    and nothing is graded. `task` is what results are grouped by."""

    prompt: str | None = None
    messages: tuple[Mapping[str, str], ...] = ()
    answer: str | None = None
    task: str = "items"


@dataclass(frozen=True, slots=True)
class EncodedSample:
    """Ids of a prompt, and of the answer with the id that ends it. The prompt of a plain text is empty."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]


class TextEncoder(Protocol):
    """What is needed of a tokenizer."""

    eos_token_ids: tuple[int, ...]

    def encode(self, text: str) -> list[int]: ...

    def encode_part(self, text: str) -> list[int]: ...

    def encode_chat(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True
    ) -> list[int]: ...


def item_sample(item: Item) -> Sample:
    """A question of the embedded model's tasks."""
    return Sample(messages=item.messages, answer=item.answer, task=item.task)


def read_samples(path: Path) -> list[Sample]:
    """All samples of a file. Raises ConfigError that names file, line, value and limit."""
    try:
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            raise ConfigError(f"{str(path)!r} has {size:,} bytes, the limit is {MAX_FILE_BYTES:,}; give a part of it")
        with path.open("rb") as file:
            samples = [_sample(value, where) for value, where in _objects(file, str(path))]
    except OSError as error:
        raise ConfigError(f"{str(path)!r} cannot be read: {error.strerror}; give a file of JSON lines") from error
    if not samples:
        raise ConfigError(f"{str(path)!r} has no lines; write one JSON object per line: {FORMS}")
    return samples


def drawn(samples: Sequence[Sample], limit: int | None, seed: int) -> list[Sample]:
    """At most `limit` of the samples, by a seed, in their order."""
    if limit is None or limit >= len(samples):
        return list(samples)
    places = random.Random(seed).sample(range(len(samples)), limit)  # noqa: S311  # a choice that can be repeated
    return [samples[place] for place in sorted(places)]


def encoded(sample: Sample, tokenizer: TextEncoder) -> EncodedSample:
    """The ids of a sample. A chat's answer ends as the template ends it.

    Raises PromptTemplateError for messages that the model's template refuses.
    """
    if sample.prompt is not None:
        prompt = tokenizer.encode(sample.prompt)
        if sample.answer is None:
            return EncodedSample((), tuple(prompt))
        return EncodedSample(tuple(prompt), tuple(tokenizer.encode_part(sample.answer)))
    assert sample.answer is not None, "a chat has an answer"
    prompt = tokenizer.encode_chat(sample.messages)
    turn = {"role": "assistant", "content": sample.answer}
    whole = tokenizer.encode_chat([*sample.messages, turn], add_generation_prompt=False)
    if whole[: len(prompt)] != prompt:
        # Templates that put thoughts or dates between the two; the answer's own text is scored then.
        return EncodedSample(tuple(prompt), tuple(tokenizer.encode_part(sample.answer)))
    answer = whole[len(prompt) :]
    ends = [place for place, token in enumerate(answer) if token in tokenizer.eos_token_ids]
    return EncodedSample(tuple(prompt), tuple(answer[: ends[0] + 1] if ends else answer))


def _objects(file: Any, name: str) -> Iterator[tuple[dict[str, object], str]]:
    """Objects and where they stand; empty lines are passed over."""
    number = 0
    while line := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        where = f"{name!r} line {number:,}"
        if number > MAX_LINES:
            raise ConfigError(f"{name!r} has more than {MAX_LINES:,} lines, the limit; give a part of it")
        if len(line) > MAX_LINE_BYTES:
            raise ConfigError(f"{where} has more than {MAX_LINE_BYTES:,} bytes, the limit; split the text")
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        # RecursionError: nesting beyond the interpreter's limit; ValueError covers bad UTF-8 and JSON.
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{where} is not JSON: {error}; write one object per line: {FORMS}") from error
        if not isinstance(value, dict):
            raise ConfigError(f"{where} is a JSON {type(value).__name__}, expected an object: {FORMS}")
        yield value, where


def _sample(value: Mapping[str, object], where: str) -> Sample:
    kinds = [name for name in ("text", "prompt", "messages") if name in value]
    if len(kinds) != 1:
        raise ConfigError(f"{where} has {' and '.join(kinds) or 'none'} of text, prompt, messages; give one: {FORMS}")
    answers = [name for name in ("answer", "completion") if name in value]
    if len(answers) > 1:
        raise ConfigError(f"{where} has answer and completion, which mean the same; leave one out")
    answer = _text(value, answers[0], where) if answers else None
    if kinds == ["messages"]:
        return _chat(value["messages"], answer, where)
    if kinds == ["text"]:
        if answer is not None:
            raise ConfigError(f"{where} has text and {answers[0]}; call the text prompt")
        return Sample(prompt=_text(value, "text", where))
    if answer is None:
        raise ConfigError(f"{where} has a prompt without answer; add one, or call the prompt text")
    return Sample(prompt=_text(value, "prompt", where), answer=answer)


def _text(value: Mapping[str, object], name: str, where: str) -> str:
    text = value[name]
    if not isinstance(text, str) or not text:
        raise ConfigError(f"{where}: {name} is {_shown(text)}, expected a text that is not empty")
    return text


def _chat(messages: object, answer: str | None, where: str) -> Sample:
    if not isinstance(messages, list) or not 0 < len(messages) <= MAX_MESSAGES:
        shown = f"{len(messages):,} messages" if isinstance(messages, list) else _shown(messages)
        raise ConfigError(f"{where}: messages is {shown}, expected a list of 1 to {MAX_MESSAGES:,}")
    turns: list[Mapping[str, str]] = []
    for message in messages:
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise ConfigError(f"{where}: a message is {_shown(message)}, expected an object with role and content")
        turns.append({"role": message["role"], "content": message["content"]})
    if answer is None:
        if turns[-1]["role"] != "assistant" or len(turns) == 1:
            raise ConfigError(
                f"{where}: the last of {len(turns)} messages is by {turns[-1]['role'][:40]!r}, expected the assistant's"
                " answer to another one; append it, or give it as answer"
            )
        answer = turns.pop()["content"]
    return Sample(messages=tuple(turns), answer=answer)


def _shown(value: object) -> str:
    """A hostile line must not put megabytes into an error."""
    shown = repr(value)
    return shown if len(shown) <= 80 else shown[:80] + "..."
