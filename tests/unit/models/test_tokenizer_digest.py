"""The digest by which a client sees that its tokenizer is not the node's. It travels: its value must not change."""

from __future__ import annotations

import hashlib
from pathlib import Path

from llmscale.models.fingerprint import tokenizer_digest


def test_an_empty_folder_has_the_digest_of_three_absent_files(tmp_path: Path) -> None:
    assert tokenizer_digest(tmp_path) == hashlib.sha256(bytes(24)).digest()


def test_the_digest_is_over_length_and_bytes_of_each_file_in_order(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(b"{}")
    (tmp_path / "chat_template.jinja").write_bytes(b"abc")
    expected = hashlib.sha256(b"\2\0\0\0\0\0\0\0{}" + b"\0\0\0\0\0\0\0\0" + b"\3\0\0\0\0\0\0\0abc").digest()
    assert tokenizer_digest(tmp_path) == expected
    (tmp_path / "config.json").write_bytes(b"weights are not text")
    assert tokenizer_digest(tmp_path) == expected


def test_bytes_that_move_from_one_file_to_the_next_change_the_digest(tmp_path: Path) -> None:
    for name, content in (("tokenizer.json", b"ab"), ("tokenizer_config.json", b"c")):
        (tmp_path / name).write_bytes(content)
    before = tokenizer_digest(tmp_path)
    for name, content in (("tokenizer.json", b"a"), ("tokenizer_config.json", b"bc")):
        (tmp_path / name).write_bytes(content)
    assert tokenizer_digest(tmp_path) != before
