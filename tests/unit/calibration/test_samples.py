"""Files of texts: what a line means, and that every mistake is one typed error with its line and the limit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llmscale import samples
from llmscale.calibration.texts import TextLimits, calibration_texts
from llmscale.embedded import embedded_model_path
from llmscale.embedded.tasks.splits import seen_items, unseen_items
from llmscale.errors import ConfigError
from llmscale.samples import Sample, drawn, encoded, item_sample, read_samples
from llmscale.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(embedded_model_path("tiny-chat"))


def write(path: Path, *lines: object) -> Path:
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


def test_every_form_of_a_line_is_read(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "2+2"}, {"role": "assistant", "content": "4"}]
    path = write(
        tmp_path / "a.jsonl",
        {"text": "Once"},
        "",
        {"prompt": "1+1=", "completion": "2"},
        {"prompt": "1+1=", "answer": "2", "id": 7},
        {"messages": turns},
        {"messages": turns[:1], "answer": "4"},
    )
    chat = Sample(messages=({"role": "user", "content": "2+2"},), answer="4")
    pair = Sample(prompt="1+1=", answer="2")
    assert read_samples(path) == [Sample(prompt="Once"), pair, pair, chat, chat]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "line 2 is not JSON"),
        ("[1]", "line 2 is a JSON list, expected an object"),
        ("[" * 100_000, "line 2 is not JSON"),
        ('{"text": "a", "prompt": "b"}', "line 2 has text and prompt of text, prompt, messages; give one"),
        ("{}", "line 2 has none of text, prompt, messages"),
        ('{"text": ""}', "line 2: text is '', expected a text that is not empty"),
        ('{"text": 5}', "line 2: text is 5"),
        ('{"text": "a", "answer": "b"}', "has text and answer; call the text prompt"),
        ('{"prompt": "a"}', "a prompt without answer"),
        ('{"prompt": "a", "answer": "b", "completion": "b"}', "answer and completion, which mean the same"),
        ('{"messages": []}', "messages is 0 messages, expected a list of 1 to 1,024"),
        ('{"messages": [{"role": "user"}]}', "expected an object with role and content"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "the last of 1 messages is by 'user'"),
        ('{"text": "' + "x" * 300 + '"}', "line 2 has more than 256 bytes, the limit"),
    ],
)
def test_a_bad_line_is_refused_by_its_number(
    line: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "256" in said:
        monkeypatch.setattr(samples, "MAX_LINE_BYTES", 256)
    path = write(tmp_path / "a.jsonl", {"text": "fine"}, line)
    with pytest.raises(ConfigError) as caught:
        read_samples(path)
    assert said in str(caught.value)
    assert len(str(caught.value)) < 500


def test_a_file_is_bounded_and_must_be_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        read_samples(tmp_path / "none")
    with pytest.raises(ConfigError, match="has no lines"):
        read_samples(write(tmp_path / "empty", ""))
    path = write(tmp_path / "a", *({"text": "a"} for _ in range(4)))
    monkeypatch.setattr(samples, "MAX_LINES", 3)
    with pytest.raises(ConfigError, match="more than 3 lines"):
        read_samples(path)
    monkeypatch.setattr(samples, "MAX_FILE_BYTES", 10)
    with pytest.raises(ConfigError, match="the limit is 10; give a part of it"):
        read_samples(path)
    (tmp_path / "bytes").write_bytes(b'{"text": "\xff"}')
    monkeypatch.undo()
    with pytest.raises(ConfigError, match="line 1 is not JSON"):
        read_samples(tmp_path / "bytes")


def test_a_limit_draws_by_the_seed_and_keeps_the_order() -> None:
    many = [Sample(prompt=str(number)) for number in range(50)]
    first, again, other = drawn(many, 10, 1), drawn(many, 10, 1), drawn(many, 10, 2)
    assert first == again != other
    assert [int(one.prompt or "") for one in first] == sorted(int(one.prompt or "") for one in first)
    assert drawn(many, None, 1) == drawn(many, 50, 1) == many


def test_an_answer_of_a_chat_ends_as_the_template_ends_it(tokenizer: Tokenizer) -> None:
    item = unseen_items(20, 3)[0]
    ids = encoded(item_sample(item), tokenizer)
    assert tokenizer.decode(ids.answer, skip_special_tokens=False) == item.answer + "<|im_end|>"
    assert tokenizer.decode(ids.prompt, skip_special_tokens=False).endswith("<|im_start|>assistant\n")
    plain = encoded(Sample(prompt="1+1=", answer="2"), tokenizer)
    assert tokenizer.decode([*plain.prompt, *plain.answer]) == "1+1=2"
    assert encoded(Sample(prompt="1+1="), tokenizer).prompt == ()


def test_seen_and_unseen_items_share_no_question() -> None:
    graded = {item.turns for item in unseen_items(400, 1)}
    seen = seen_items(400, 1)
    assert len({item.turns for item in seen}) == 400
    assert not graded & {item.turns for item in seen}
    assert seen == seen_items(400, 1) != seen_items(400, 2)


def test_calibration_texts_keep_within_their_limits(tokenizer: Tokenizer, tmp_path: Path) -> None:
    limits = TextLimits(max_sequences=40, max_sequence_tokens=30, max_tokens=500)
    texts = calibration_texts("builtin", tokenizer, limits, 0)
    assert sum(map(len, texts)) == 500
    assert max(map(len, texts)) == 30
    path = write(tmp_path / "a", *({"text": f"A fox number {number}"} for number in range(9)))
    assert len(calibration_texts(str(path), tokenizer, TextLimits(max_sequences=4), 0)) == 4
    with pytest.raises(
        ConfigError, match=r"max_tokens \(--calibration-tokens\) of the calibration is 0, it must be at least 1"
    ):
        calibration_texts("builtin", tokenizer, TextLimits(max_tokens=0), 0)
    with pytest.raises(ConfigError, match=r"max_sequences \(--calibration-samples\) of the calibration is 0"):
        calibration_texts("builtin", tokenizer, TextLimits(max_sequences=0), 0)
