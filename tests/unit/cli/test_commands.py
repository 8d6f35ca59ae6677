"""The commands that end by themselves: what they print, and that a user's mistake is one line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


def llmscale(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "llmscale.cli", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)


def test_the_help_names_every_command() -> None:
    done = llmscale("--help")
    assert done.returncode == 0
    for command in ("serve", "info", "generate", "keys"):
        assert command in done.stdout


def test_info_says_what_a_folder_holds() -> None:
    done = llmscale("info", "tiny-chat")
    assert done.returncode == 0, done.stderr
    for said in ("llama", "bfloat16", "2,048 tokens", "blocks of 32 tokens"):
        assert said in done.stdout.lower(), said


def test_generate_completes_a_text_the_same_twice() -> None:
    words = ("generate", "Once upon a time", "--max-tokens", "8")
    first, second = llmscale(*words), llmscale(*words)
    assert first.returncode == 0, first.stderr
    assert first.stdout.strip()
    assert first.stdout == second.stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("info", "no-such-model"), "no-such-model"),
        (("generate", "x", "--model", "no-such-model"), "no-such-model"),
        (("generate", "x", "--max-tokens", "0"), "max_tokens"),
        (("generate", "x", "--temperature", "-1"), "temperature"),
        (("serve", "no-such-model"), "no-such-model"),
        (("serve", "tiny-chat", "--host", "0.0.0.0"), "API key"),
        (("serve", "tiny-chat", "--dtype", "float17"), "dtype"),
        (("serve", "tiny-chat", "--port", "70000"), "port"),
        (("serve", "tiny-chat", "--max-model-len", "0"), "max"),
        (("serve", "tiny-chat", "--api-key-file", "no-such-file"), "no-such-file"),
        (("keys", "unused", "gateway"), "gateway:NAME"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_a_mistake_is_one_line_and_exit_code_one(words: tuple[str, ...], said: str, tmp_path: Path) -> None:
    done = llmscale(*words)
    assert done.returncode == 1, done.stdout + done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
