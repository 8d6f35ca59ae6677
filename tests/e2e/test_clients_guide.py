"""Goal: docs/guides/clients.md can be typed as it stands, and its tables are the truth.

Method: the guide's own blocks beside real servers; only addresses differ. Its tables beside the routes, the structs
that check requests and the tree of errors.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from llmscale import errors
from llmscale.gateway.app import KEY, ROUTES
from llmscale.gateway.openai import ChatRequest, CompletionRequest
from llmscale.gateway.vllm import DetokenizeRequest, TokenizeChatRequest, TokenizePromptRequest
from tests.processes import API_KEY, Server, free_port, serving
from tests.support_processes import node

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs" / "guides" / "clients.md").read_text(encoding="utf-8")
SERVER = "http://127.0.0.1:8000"
NODE = "tcp://127.0.0.1:7000"
# What ends a request with an answer of its own, of all errors.
TOLD = (errors.RequestError, errors.Overloaded, errors.Unavailable, errors.RequestFailed)


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", GUIDE, flags=re.MULTILINE | re.DOTALL)


def run(command: list[str], folder: Path, **environment: str) -> str:
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True, check=False, timeout=100
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def rows(heading: str) -> list[list[str]]:
    """The cells of all tables of a section, their heads left out."""
    section = GUIDE.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    lines = re.findall(r"^\| (.*) \|$", section, flags=re.MULTILINE)
    return [line.split(" | ") for line in lines if "`" in line.split(" | ")[1] or "`" in line.split(" | ")[0]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where the guide's reader works."""
    (tmp_path / ".venv").symlink_to(sys.prefix)
    return tmp_path


@pytest.fixture(scope="module")
def node_address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A node on tiny-chat, as the guide's command starts one."""
    command = next(block for block in blocks("bash") if "llmscale.node" in block)
    assert command.split()[1:] == ["-m", "llmscale.node", "--model", "tiny-chat", "--listen", NODE]
    address = f"tcp://127.0.0.1:{free_port()}"
    with node(tmp_path_factory.mktemp("node"), address=address):
        yield address


def test_a_key_is_sent_as_the_guide_says(folder: Path) -> None:
    command = next(block for block in blocks("bash") if "$KEY" in block)
    with serving("tiny-chat-mini", "--api-key", API_KEY) as server:
        listed = run(["bash", "-ec", command.replace(SERVER, server.base)], folder, KEY=API_KEY)
    assert [model["id"] for model in json.loads(listed)["data"]] == ["tiny-chat-mini"]


def test_an_unknown_field_is_refused_as_the_guide_shows(server: Server, folder: Path) -> None:
    command = next(block for block in blocks("bash") if '"max_token"' in block)
    assert [run(["bash", "-ec", command.replace(SERVER, server.base)], folder) + "\n"] == blocks("json")[:1]


def test_a_text_has_the_ids_that_the_guide_shows(server: Server, folder: Path) -> None:
    command = next(block for block in blocks("bash") if "/tokenize" in block)
    assert [run(["bash", "-ec", command.replace(SERVER, server.base)], folder) + "\n"] == blocks("json")[1:]


def test_a_stream_ends_with_its_usage_and_done(server: Server, folder: Path) -> None:
    command = next(block for block in blocks("bash") if '"stream": true' in block)
    lines = run(["bash", "-ec", command.replace(SERVER, server.base)], folder).split()
    assert lines[-2:] == ["data:", "[DONE]"]
    events = re.findall(r'"completion_tokens":(\d+)', " ".join(lines))
    assert events == ["16"]


def test_the_examples_of_the_sdk_run(server: Server, node_address: str, folder: Path) -> None:
    rendered, sync, concurrent, direct = (
        run([sys.executable, "-c", code.replace(SERVER, server.base).replace(NODE, node_address)], folder).splitlines()
        for code in blocks("python")
    )
    assert rendered == ["17 68"]
    assert sync[0] == "['tiny-chat'] ready"
    assert sync[-2:] == ["0 restarts, finished: False", "unknown_model"]
    assert concurrent == ["['68', '69']"]
    assert re.match(r"\((\d+, ){7}\d+\) \S", direct[0])


def test_a_text_is_completed_without_a_server(folder: Path) -> None:
    command = next(block for block in blocks("bash") if "llmscale generate" in block)
    assert run(["bash", "-ec", command], folder).startswith("Once upon a time")


def test_every_route_is_listed_with_whether_it_needs_a_key() -> None:
    listed = [(cells[0].strip("`"), cells[1]) for cells in rows("Endpoints")]
    assert listed == [(f"{method} {path}", "yes" if access is KEY else "no") for method, path, _, access in ROUTES]


@pytest.mark.parametrize(
    ("heading", "kinds"),
    [
        ("Fields", (CompletionRequest, ChatRequest)),
        ("Tokens", (TokenizePromptRequest, TokenizeChatRequest, DetokenizeRequest)),
    ],
)
def test_every_field_is_listed_with_its_default(heading: str, kinds: tuple[type[msgspec.Struct], ...]) -> None:
    written: dict[str, str] = {}
    for names, default, *_ in rows(heading):
        written |= dict.fromkeys(re.findall(r"`(\w+)`", names), default)
    known: dict[str, Any] = {field.name: field for kind in kinds for field in msgspec.structs.fields(kind)}
    assert set(written) == set(known)
    assert {name for name, default in written.items() if default == "needed"} == {
        name for name, field in known.items() if field.required
    }


def test_every_error_that_http_tells_is_listed_with_its_status() -> None:
    def below(kind: type[errors.LlmscaleError]) -> Iterator[type[errors.LlmscaleError]]:
        # Other tests' files may add classes of their own.
        for one in kind.__subclasses__():
            if one.__module__ == errors.__name__:
                yield one
                yield from below(one)

    # What has kinds below it that say more is not raised itself, but for a request that failed in another way.
    told = {one for kind in TOLD for one in (kind, *below(kind))} - {errors.RequestError}
    expected = {(one.http_status, one.code) for one in told} | {(500, errors.LlmscaleError.code)}
    listed = [(int(status), code.strip("`")) for status, code, _ in rows("Errors")]
    assert set(listed) == expected
    assert len(listed) == len(expected)
    assert listed == sorted(listed, key=lambda row: row[0])
