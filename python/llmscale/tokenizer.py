"""Text to token ids and back: the only place that sees both.

`Tokenizer` reads a model folder (tokenizer.json, tokenizer_config.json, the configs' ids, chat template), encodes
prompts in time linear in their bytes, which are bounded before, and renders chats so that control ids come from the
template alone: text from a request is parsed for special tokens only where a prompt asks for it. `Detokenizer` turns
one stream of ids into text in O(1) per token. Nothing here knows of HTTP, of engines or of torch.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import tokenizers

from llmscale.chat_template import RESERVED_VARIABLES, ChatTemplate, with_text_contents
from llmscale.detokenizer import Detokenizer
from llmscale.end_tokens import end_token_ids
from llmscale.errors import InvalidField, InvalidTokenizer, PromptTemplateError, RequestTooLong
from llmscale.final_message import FinalMessage, check_continued
from llmscale.template_budget import DEFAULT_LIMITS, TemplateLimits
from llmscale.tokenizer_json import MAX_SETTINGS_BYTES, read_definition, read_settings, token_text

_LARGE_TEXT: Final = 2_048
"""Characters, or ids."""
_NAMED_TOKENS: Final = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_BYTE_FALLBACK: Final = re.compile(r"<0x([0-9A-F]{2})>")
_RESERVED_VARIABLES: Final = RESERVED_VARIABLES.union(_NAMED_TOKENS)


@dataclass(frozen=True, slots=True)
class GenerationDefaults:
    """The sampling that the model's author recommends in generation_config.json; None where it says nothing."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None


class Tokenizer:
    """The tokenizer of one model folder. Thread-safe after construction.

    `vocabulary` is the number of ids that the model has; a tokenizer with a larger id raises `InvalidTokenizer`.
    """

    def __init__(self, folder: Path, *, vocabulary: int | None = None, limits: TemplateLimits = DEFAULT_LIMITS) -> None:
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise InvalidTokenizer(
                f"{folder} has no tokenizer.json; convert the tokenizer with the transformers library"
            )
        definition, settings = read_definition(folder), read_settings(folder)
        generation = read_settings(folder, "generation_config.json")
        self._tokenizer = _build(definition)
        self._named = {name: text for name in _NAMED_TOKENS if (text := token_text(settings.get(name)))}
        ids = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocabulary = 1 + max(ids.values(), default=-1)
        if vocabulary is not None and self.vocabulary > vocabulary:
            raise InvalidTokenizer(
                f"the tokenizer has ids up to {self.vocabulary - 1}, the model's vocabulary is {vocabulary};"
                " the files belong to different models"
            )
        self._longest_token_bytes = max((len(text.encode()) for text in ids), default=1)
        self._byte_level = '"ByteLevel"' in json.dumps(definition.get("decoder"))
        controls = _control_tokens(definition, settings, self._named)
        self.control_ids = {text: ids[text] for text in controls if text in ids}
        self._prefix, self._suffix = self._surrounding_ids()
        self._encoder = _SafeEncoder(definition, self.control_ids, self._named.get("unk_token"))
        listed = _listed_ends(generation) or _listed_ends(read_settings(folder, "config.json"))
        self.eos_token_ids = end_token_ids(listed, definition, settings)
        self.generation_defaults = _generation_defaults(generation)
        source = _chat_template_source(folder, settings)
        self.chat_template = ChatTemplate(source, limits=limits) if source is not None else None

    def max_prompt_bytes(self, max_sequence_tokens: int) -> int:
        """A prompt of more bytes cannot fit into this many tokens, however it is split."""
        return max_sequence_tokens * self._longest_token_bytes

    def encode(
        self,
        text: str,
        *,
        max_tokens: int | None = None,
        add_special_tokens: bool = True,
        parse_special_tokens: bool = False,
    ) -> list[int]:
        """The ids of a prompt, with those that the model wants around it unless `add_special_tokens` is false.

        Special tokens in the text stay text. With `parse_special_tokens` they become their ids, and a text that begins
        with what the model wants before it gets that no second time. Raises `RequestTooLong` before it tokenizes when
        the text cannot fit into `max_tokens`, and `InvalidField` for halves of characters (lone surrogates), which have
        no bytes.
        """
        self._check_length(text, max_tokens, "prompt")
        _check_unicode(text, "prompt")
        ids = self._encoder.encode_rendered(text) if parse_special_tokens else self._encoder.encode(text)
        if not add_special_tokens:
            return ids
        # Chat templates write the first token themselves. vLLM puts another one before such a text; no model has been
        # trained on two, and the ids would not be those of the same conversation sent as messages.
        is_begun = parse_special_tokens and ids[: len(self._prefix)] == self._prefix
        prefix = [] if is_begun else self._prefix
        return [*prefix, *ids, *self._suffix] if prefix or self._suffix else ids

    def encode_part(self, text: str) -> list[int]:
        """The ids of a text that goes on where another one ended, with nothing around it."""
        _check_unicode(text, "text")
        return self._encoder.encode(text)

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        variables: Mapping[str, Any] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        max_tokens: int | None = None,
    ) -> list[int]:
        """The ids of a conversation, rendered by the model's chat template.

        `messages` are objects with `role` and `content`, a text or a list of text parts. `variables` are passed to the
        template, which reads some and passes over the others; what it gets from elsewhere they cannot replace. With
        `continue_final_message`, for which `add_generation_prompt` must be false, the ids end where the last message's
        text does, so that the model goes on with it. Raises a `RequestError`.
        """
        if self.chat_template is None:
            raise PromptTemplateError("this model has no chat template; use /v1/completions", field="messages")
        if reserved := sorted(_RESERVED_VARIABLES.intersection(variables or ())):
            raise PromptTemplateError(
                f"chat_template_kwargs has {', '.join(reserved)}, which the server gives to templates; leave it out",
                field="chat_template_kwargs",
            )
        if continue_final_message:
            check_continued(messages, add_generation_prompt=add_generation_prompt)
        protect = self._encoder.protect
        given = protect(with_text_contents(messages))
        final = FinalMessage(given) if continue_final_message else None
        text = self.chat_template.render(
            {
                **self._named,
                "tools": None,
                "documents": None,
                **(protect(variables) if variables else {}),
                "messages": given if final is None else final.messages,
                "add_generation_prompt": add_generation_prompt,
            }
        )
        if final is not None:
            text = final.cut(text)
        self._check_length(text, max_tokens, "messages")
        _check_unicode(text, "messages")
        return self._encoder.encode_rendered(text)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of a whole sequence of ids."""
        if len(ids) < _LARGE_TEXT:
            return self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)
        # As in `_ids`: 220,000 ids in `decode` held all other threads up for 0.15 s.
        return self._tokenizer.decode_batch([ids], skip_special_tokens=skip_special_tokens)[0]

    def token_texts(self, ids: Sequence[int]) -> list[str]:
        """Ids as the vocabulary spells them, which is not their text: byte-level ones have "\u0120" for a space."""
        # Each spelling is made once, however many ids there are of it.
        spelled = {token: self._tokenizer.id_to_token(token) or "" for token in set(ids)}
        return [spelled[token] for token in ids]

    def detokenizer(self, *, skip_special_tokens: bool = True, context: Sequence[int] = ()) -> Detokenizer:
        """Starts the text of one stream, which goes on after the ids in `context`."""
        return Detokenizer(self._tokenizer, skip_special_tokens=skip_special_tokens, context=context)

    def token_bytes(self, token: int) -> bytes:
        """The bytes that one id stands for, which need not be whole characters. Unknown ids stand for nothing."""
        piece = self._tokenizer.id_to_token(token)
        if piece is None:
            return b""
        if piece in self.control_ids:
            return piece.encode()
        if self._byte_level:
            table = _BYTE_OF_CHARACTER
            if all(character in table for character in piece):
                return bytes(table[character] for character in piece)
            return piece.encode()
        if match := _BYTE_FALLBACK.fullmatch(piece):
            return bytes([int(match[1], 16)])
        return piece.replace("\u2581", " ").encode()

    def _check_length(self, text: str, max_tokens: int | None, field: str) -> None:
        if max_tokens is None or len(text) <= max_tokens:
            return
        limit = self.max_prompt_bytes(max_tokens)
        size = len(text.encode(errors="surrogatepass"))
        if size > limit:
            raise RequestTooLong.beyond(
                max_tokens, f"the prompt has {size} bytes, which cannot fit", "shorten it", field=field
            )

    def _surrounding_ids(self) -> tuple[list[int], list[int]]:
        bare = self._tokenizer.encode("a", add_special_tokens=False).ids
        full = self._tokenizer.encode("a", add_special_tokens=True).ids
        for start in range(len(full) - len(bare) + 1):
            if full[start : start + len(bare)] == bare:
                return full[:start], full[start + len(bare) :]
        raise InvalidTokenizer(
            "the tokenizer's post-processor changes ids instead of adding some, which is not supported"
        )


class _SafeEncoder:
    """Encodes text so that no control id can come from it.

    It is a copy of the tokenizer in which every control token has a secret spelling, in the added tokens and in the
    vocabulary. Hence text cannot spell one by any route (added tokens, `ignore_merges`, whole-word or Unigram matches),
    and the template's own control tokens are respelled after rendering, so that the text around them is split as
    always.
    """

    def __init__(self, definition: dict[str, Any], control_ids: Mapping[str, int], unknown: str | None) -> None:
        secret = secrets.token_hex(12)
        self._spelling = {text: f"<{secret}{token}>" for text, token in control_ids.items()}
        self._tokenizer = _build(_respelled(definition, control_ids, self._spelling))
        self._control_ids = frozenset(token for text, token in control_ids.items() if text != unknown)
        # A mark stands for the first character of a control token in a request's text while the template sees it.
        self._mark = f"[{secret}"
        self._marked = re.compile(re.escape(self._mark) + r"([0-9a-f]+)\]")
        longest_first = sorted(control_ids, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first))) if longest_first else None
        self._longest = len(longest_first[0]) if longest_first else 0
        self._prefixes = {text[:end] for text in control_ids for end in range(1, len(text))}
        self._suffixes = {text[start:] for text in control_ids for start in range(1, len(text))}
        self._first_characters = {text[0] for text in control_ids}
        self._last_characters = {text[-1] for text in control_ids}

    def encode(self, text: str) -> list[int]:
        """The ids of a text from a request."""
        ids = self._ids(text)
        if not self._control_ids.isdisjoint(ids):
            raise AssertionError("a text was encoded to a control token")
        return ids

    def encode_rendered(self, text: str) -> list[int]:
        """The ids of a text whose control tokens count: a rendered template whose values were protected, or a prompt
        that asks for it."""
        expected = 0
        if self._pattern is not None:
            text, expected = self._pattern.subn(lambda match: self._spelling[match[0]], text)
        if self._mark in text:
            text = self._marked.sub(lambda match: chr(int(match[1], 16)), text)
        ids = self._ids(text)
        if sum(map(self._control_ids.__contains__, ids)) > expected:
            raise AssertionError("a text was encoded to more control tokens than it spells")
        return ids

    def _ids(self, text: str) -> list[int]:
        if len(text) < _LARGE_TEXT:
            ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        else:
            # Only the batch call gives other threads a turn: 1 MB in `encode` held the event loop up for 0.4 s.
            ids = self._tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids
        return ids

    def protect(self, value: Any) -> Any:
        """A copy of a JSON value in which no text spells, begins or ends a control token."""
        if isinstance(value, str):
            return self._protect_text(value)
        if isinstance(value, Mapping):
            return {self.protect(key): self.protect(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.protect(item) for item in value]
        return value

    def _protect_text(self, text: str) -> str:
        if self._pattern is None or not text:
            return text
        # Again until nothing is left: in "aaa" the matches of "aa" overlap.
        while self._pattern.search(text):
            text = self._pattern.sub(lambda match: self._masked(match[0], 0), text)
        # A template may put two texts next to each other, or trim them first: neither edge may begin or end a token.
        end = len(text.rstrip())
        first = max(0, end - self._longest + 1)
        if not self._first_characters.isdisjoint(text[first:end]):
            for start in range(first, end):
                if text[start:end] in self._prefixes:
                    text = self._masked(text, start)
                    break
        begin = len(text) - len(text.lstrip())
        last = min(len(text), begin + self._longest)
        if not self._last_characters.isdisjoint(text[begin:last]):
            for stop in range(begin + 1, last + 1):
                if text[begin:stop] in self._suffixes:
                    text = self._masked(text, begin)
                    break
        return text

    def _masked(self, text: str, position: int) -> str:
        return f"{text[:position]}{self._mark}{ord(text[position]):x}]{text[position + 1 :]}"


def _build(definition: dict[str, Any]) -> tokenizers.Tokenizer:
    try:
        built = tokenizers.Tokenizer.from_str(json.dumps(definition))
    except Exception as error:  # The library raises bare Exceptions for every malformed definition.
        raise InvalidTokenizer(f"tokenizer.json cannot be used: {error}") from error
    # A folder may carry the truncation and padding of its training run; a prompt must never be cut silently.
    built.no_truncation()
    built.no_padding()
    return built


def _listed_ends(config: Mapping[str, Any]) -> list[int]:
    listed = config.get("eos_token_id")
    return [value for value in (listed if isinstance(listed, list) else [listed]) if type(value) is int]


def _check_unicode(text: str, field: str) -> None:
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidField(f"{field} is no Unicode text: {error}", field=field) from error


def _control_tokens(definition: Mapping[str, Any], settings: Mapping[str, Any], named: Mapping[str, str]) -> set[str]:
    """Texts of the special tokens: those that steer the model and that no text from a request may spell."""
    listed: list[object] = list(definition.get("added_tokens") or [])
    decoder = settings.get("added_tokens_decoder")
    if isinstance(decoder, dict):
        listed += decoder.values()
    found = {
        text for entry in listed if isinstance(entry, dict) and entry.get("special") and (text := token_text(entry))
    }
    extra = settings.get("additional_special_tokens")
    found.update(text for entry in (extra if isinstance(extra, list) else []) if (text := token_text(entry)))
    return found | set(named.values())


def _respelled(
    definition: dict[str, Any], control_ids: Mapping[str, int], spelling: Mapping[str, str]
) -> dict[str, Any]:
    """The definition with other texts for control tokens, and without a post-processor, whose texts would not fit."""
    model = dict(definition.get("model") or {})
    vocabulary = model.get("vocab")
    if isinstance(vocabulary, dict):
        model["vocab"] = {spelling.get(text, text): token for text, token in vocabulary.items()}
    elif isinstance(vocabulary, list):
        model["vocab"] = [[spelling.get(text, text), score] for text, score in vocabulary]
    if isinstance(model.get("unk_token"), str):
        model["unk_token"] = spelling.get(model["unk_token"], model["unk_token"])
    added = {entry.get("content"): entry for entry in definition.get("added_tokens") or []}
    for text, token in control_ids.items():
        usual = {"id": token, "lstrip": False, "rstrip": False}
        # Found wherever it stands, also one that only the settings name: else ids would spell the secret.
        always = {"content": spelling[text], "special": True, "normalized": False, "single_word": False}
        added[text] = {**usual, **added.get(text, {}), **always}
    return {**definition, "model": model, "added_tokens": list(added.values()), "post_processor": None}


def _generation_defaults(generation: Mapping[str, Any]) -> GenerationDefaults:
    def number(name: str) -> float | None:
        value = generation.get(name)
        return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None

    top_k = number("top_k")
    # An author who says "do_sample": false means greedy decoding; transformers then ignores the temperature too.
    greedy = generation.get("do_sample") is False
    return GenerationDefaults(
        temperature=0.0 if greedy else number("temperature"),
        top_p=number("top_p"),
        top_k=int(top_k) if top_k is not None else None,
        min_p=number("min_p"),
        repetition_penalty=number("repetition_penalty"),
    )


def _chat_template_source(folder: Path, settings: Mapping[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        if path.stat().st_size > MAX_SETTINGS_BYTES:
            raise InvalidTokenizer(
                f"chat_template.jinja has {path.stat().st_size} bytes, the limit is {MAX_SETTINGS_BYTES}"
            )
        return path.read_text(encoding="utf-8")
    value = settings.get("chat_template")
    if isinstance(value, list):
        named: Iterable[tuple[object, object]] = (
            (e.get("name"), e.get("template")) for e in value if isinstance(e, dict)
        )
        value = dict(named).get("default")
    return value if isinstance(value, str) else None


def _byte_of_character() -> dict[str, int]:
    """The alphabet of byte-level BPE (GPT-2): printable Latin-1 characters stand for themselves, others follow
    U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(value): value for value in printable}
    shifted = [value for value in range(256) if value not in set(printable)]
    return table | {chr(0x100 + position): value for position, value in enumerate(shifted)}


_BYTE_OF_CHARACTER: Final = _byte_of_character()
