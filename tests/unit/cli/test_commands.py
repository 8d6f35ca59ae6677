"""The commands that end by themselves: what they print, and that a user's mistake is one line."""

from __future__ import annotations

import socket
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
    for command in ("serve", "info", "generate", "quantize", "keys"):
        assert command in done.stdout


def test_info_says_what_a_folder_holds() -> None:
    done = llmscale("info", "tiny-chat")
    assert done.returncode == 0, done.stderr
    for said in ("llama", "bfloat16", "2,048 tokens", "blocks of 32 tokens", "native (auto is native for one rank"):
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
        (("serve", "tiny-chat", "--threads", "0"), "threads is 0, it must be from 1 to 1,024"),
        (("serve", "tiny-chat", "--threads", "-1"), "threads is -1"),
        (
            ("serve", "tiny-chat", "--served-model-name", "名" * 86),
            "has 258 bytes of UTF-8, it must have from 1 to 256",
        ),
        (("serve", "tiny-chat", "--kv-cache-bytes", "9" * 20), "blocks; the most is 16,777,216"),
        (("eval", "--threads", "1025"), "threads is 1025, it must be from 1 to 1,024"),
        (
            ("serve", "tiny-chat", "--max-model-len", "1"),
            "(max_model_len, --max-model-len) is 1, but this model allows",
        ),
        (("serve", "tiny-chat", "--max-model-len", "1"), "Ask for more."),
        (("serve", "tiny-chat", "--max-model-len", "2049"), "Ask for less, or serve a model with a longer context."),
        (("serve", "tiny-chat", "--max-num-seqs", "0"), "(max_num_seqs, --max-num-seqs) is 0, it must be above 0"),
        (("serve", "tiny-chat", "--max-num-seqs", "16385"), "--max-num-seqs) is 16,385, it must be at most 16,384"),
        (("serve", "tiny-chat", "--max-num-batched-tokens", "0"), "--max-num-batched-tokens) is 0, it must be above 0"),
        (("serve", "tiny-chat", "--max-num-batched-tokens", f"{1 << 40}"), "it must be at most 1,048,576"),
        (
            ("serve", "tiny-chat", "--kv-cache-bytes", "1000"),
            "or lower max_sequence_tokens (max_model_len, --max-model-",
        ),
        (("serve", "tiny-chat", "--port", "0", "--api-key-file", "no-such-file"), "no-such-file"),
        (("serve", "--fleet-file", "no-such-file"), "no-such-file"),
        (("serve", "tiny-chat", "--fleet-file", "x", "--port", "8000"), "port, model is given beside --fleet-file"),
        (("serve", "~nobody-has-this-name/model"), "home folder of '~nobody-has-this-name/model' cannot be found"),
        (("info", "/" + "x" * 300), "File name too long"),
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


def test_a_full_disk_is_one_line_of_quantize(tmp_path: Path) -> None:
    """The largest file that a process may write is a disk of that size, as far as the process can tell."""
    command = [sys.executable, "-m", "llmscale.cli", "quantize", "tiny-chat", str(tmp_path / "out"), "--method", "int8"]
    words = ["bash", "-c", 'ulimit -f 64; exec "$@"', "bash", *command]
    done = subprocess.run(words, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("llmscale: ")
    assert "cannot be written: " in line
    assert not (tmp_path / "out").exists()


def test_a_node_whose_folder_the_system_refuses_ends_with_one_line() -> None:
    command = [sys.executable, "-m", "llmscale.node", "--model", "/" + "x" * 300, "--listen", "ipc:///unused"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    (line,) = done.stderr.strip().splitlines()
    assert "the node ends" in line
    assert "File name too long" in line


def test_a_port_that_is_taken_is_one_line_before_any_node_starts() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = llmscale("serve", "tiny-chat", "--port", str(port))
    assert done.returncode == 1
    (line,) = (line for line in done.stderr.splitlines() if "no API key is set" not in line)
    assert line.startswith(f"llmscale: cannot listen on 127.0.0.1 port {port}: ")
    assert "choose another port" in line
    assert not done.stdout, "neither gateway nor node has said that it runs"


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ("dtypes = 'float32'", "fleet.toml:3: models.a.dtypes: there is no such name; did you mean dtype?"),
        ("max_model_len = 9999", "this model allows 2 to 2,048"),
        ("pipeline_parallel_size = 200", "stages"),
        ("kv_cache_bytes = 9", "kv_cache_bytes is 9"),
    ],
)
def test_a_mistake_in_a_fleet_file_is_found_before_anything_starts(entry: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "fleet.toml"
    file.write_text(f"[models.a]\nmodel = 'tiny-chat'\n{entry}\n[models.b]\nmodel = 'tiny-chat-mini'\n")
    done = llmscale("serve", "--fleet-file", str(file))
    assert done.returncode == 1
    assert said in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not done.stdout
