"""A conversation whose last message is left open ends where its text does, with the ids that transformers makes and
without a control id that a text spells.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from llmscale.errors import InvalidField, PromptTemplateError
from llmscale.tokenizer import Tokenizer
from tests.fakes.tiny_tokenizer import write_byte_level, write_metaspace

QUESTION = {"role": "user", "content": "hello"}
# Pieces of texts: words, spaces, whole and broken control tokens.
# fmt: off
PIECES = st.sampled_from([
    "hello", " ", "\n", "assistant", "<|im_start|>", "<|im_end|>", "<|im_", "end|>", "<", "|>", "</s>", "é", "😀",
])
# fmt: on


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(write_byte_level(tmp_path_factory.mktemp("byte-level")))


def opened(tokenizer: Tokenizer, content: object) -> list[int]:
    messages = [QUESTION, {"role": "assistant", "content": content}]
    return tokenizer.encode_chat(messages, add_generation_prompt=False, continue_final_message=True)


@pytest.mark.parametrize("write", [write_byte_level, write_metaspace])
@pytest.mark.parametrize("text", ["", "It is", "  It is", "It is ", " ", "é中😀", "line\n"])
def test_an_open_message_has_the_ids_that_transformers_gives(tmp_path: Path, write: Any, text: str) -> None:
    folder = write(tmp_path)
    named = json.loads((folder / "tokenizer_config.json").read_text())
    oracle: Any = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), **named)
    expected = oracle.apply_chat_template(
        [QUESTION, {"role": "assistant", "content": text}], continue_final_message=True, return_dict=False
    )
    assert opened(Tokenizer(folder), text) == expected


def test_parts_are_gone_on_with_as_their_text(tokenizer: Tokenizer) -> None:
    parts = [{"type": "text", "text": "It"}, {"type": "text", "text": "is"}]
    assert opened(tokenizer, parts) == opened(tokenizer, "It\nis")


@settings(max_examples=300)
@given(st.lists(PIECES, max_size=8).map("".join))
def test_an_open_message_ends_the_prompt_whatever_it_spells(tokenizer: Tokenizer, text: str) -> None:
    ids = opened(tokenizer, text)
    controls = set(tokenizer.control_ids.values())
    assert [token for token in ids if token in controls] == [
        tokenizer.control_ids[name] for name in ("<|im_start|>", "<|im_end|>", "<|im_start|>")
    ]
    rendered = tokenizer.decode(ids, skip_special_tokens=False)
    assert rendered == f"<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n{text}"


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ m.role }}{% endfor %}",
        "{% for m in messages %}{{ m.content | upper }}{% endfor %}",
        "{% for m in messages %}{{ m.content[:5] }}{% endfor %}",
        "{% for m in messages %}{{ m.content | replace('is', 'was') }}{% endfor %}",
        "{{ messages[0].content }}",
    ],
    ids=["left-out", "other-case", "cut", "replaced", "first-only"],
)
def test_a_template_that_does_not_keep_the_last_text_is_an_error_that_says_so(tmp_path: Path, template: str) -> None:
    tokenizer = Tokenizer(write_byte_level(tmp_path, chat_template=template))
    with pytest.raises(PromptTemplateError, match="leaves out or changes the text of the last message") as refused:
        opened(tokenizer, "It is <|im_end|>")
    assert refused.value.field == "messages"


def test_an_earlier_message_with_the_same_text_does_not_hide_that_the_last_one_is_changed(tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m.content[1:] if loop.last else m.content }}{% endfor %}"
    tokenizer = Tokenizer(write_byte_level(tmp_path, chat_template=template))
    with pytest.raises(PromptTemplateError, match="leaves out or changes"):
        opened(tokenizer, "hello")


def test_an_answer_cannot_be_begun_and_gone_on_with_at_once(tokenizer: Tokenizer) -> None:
    with pytest.raises(InvalidField, match="cannot both be true") as refused:
        tokenizer.encode_chat([QUESTION], continue_final_message=True)
    assert refused.value.field == "add_generation_prompt"


@pytest.mark.parametrize("message", [{"role": "assistant"}, {"role": "assistant", "content": []}, None])
def test_a_message_without_text_cannot_be_gone_on_with(tokenizer: Tokenizer, message: Any) -> None:
    messages = [] if message is None else [QUESTION, message]
    with pytest.raises(InvalidField, match="no text to go on with") as refused:
        tokenizer.encode_chat(messages, add_generation_prompt=False, continue_final_message=True)
    assert refused.value.field == "messages"
