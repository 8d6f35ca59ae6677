"""The documents tell the truth: examples run as they stand, commands exist, links lead somewhere, named files and tests
are there. Method: the README's own text, its examples in child processes against a real server.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from llmscale.env import VARIABLES
from tests.processes import Server, serving

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = ["README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/security.md", "docs/wire.md"]
DOCUMENTS += sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs" / "guides").glob("*.md"))
DOCUMENTS += sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs" / "adr").glob("*.md"))
SERVER = "http://127.0.0.1:8000"
# A path in backquotes, with a folder and an ending or a trailing slash, such as `rust/net/src/zap.rs` or `rust/sim/`.
PATH = re.compile(r"`((?:rust|python|tests|bench|examples|docs|tools|\.ci)/[\w./-]*(?:\.\w+|/))`")
# How the documents begin a command of each process.
COMMANDS = {
    "llmscale.cli serve": ".venv/bin/llmscale serve",
    "llmscale.node": "python -m llmscale.node",
    "llmscale.gateway": "python -m llmscale.gateway",
}
# Files that a document may name before they exist.
WRITTEN_LATER = {"bench/LOG.md"}


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def needs_a_server(code: str) -> bool:
    return SERVER in code


def run(command: list[str]) -> str:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """tiny-chat, ready."""
    with serving("tiny-chat") as server:
        yield server


def test_there_is_an_example_of_each_way_to_use_it() -> None:
    imports = [line for code in blocks("python") for line in code.splitlines() if line.startswith(("from", "import"))]
    assert imports == [
        "from llmscale import LLM, SamplingParams",
        "from llmscale import Client, SamplingParams",
        "from openai import OpenAI",
    ]


@pytest.mark.parametrize("code", [code for code in blocks("python") if not needs_a_server(code)], ids=["LLM"])
def test_an_offline_example_runs_and_prints_an_answer(code: str) -> None:
    lines = run([sys.executable, "-c", code]).splitlines()
    assert lines[0].startswith("Once upon a time")
    assert lines[-1] == "68"


@pytest.mark.parametrize("code", [code for code in blocks("python") if needs_a_server(code)], ids=["Client", "OpenAI"])
def test_an_example_against_a_server_runs_and_prints_the_answer(code: str, server: Server) -> None:
    assert run([sys.executable, "-c", code.replace(SERVER, server.base)]).endswith("68")


def test_the_curl_line_is_answered(server: Server) -> None:
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    lines = [line for code in blocks("bash") for line in code.splitlines() if line.startswith("curl ")]
    assert len(lines) == 1
    answer = json.loads(run(["bash", "-c", lines[0].replace(SERVER, server.base).replace("curl", "curl -sS", 1)]))
    assert answer["choices"][0]["message"]["content"] == "68"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_make_target_that_is_named_exists(document: str) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    text = (ROOT / document).read_text(encoding="utf-8")
    named = set(re.findall(r"(?:`|^)make ([a-z-]+)", text, flags=re.MULTILINE))
    assert named <= targets
    if document == "README.md":
        assert {"serve", "test", "demo"} <= named


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_link_leads_to_a_file_or_a_heading(document: str) -> None:
    path = ROOT / document
    for target in re.findall(r"(?<!!)\[[^\]\n]*\]\(([^)\s]+)\)", path.read_text(encoding="utf-8")):
        if re.match(r"[a-z]+://", target):
            continue
        file, _, heading = target.partition("#")
        led = (path.parent / file).resolve() if file else path
        assert led.exists(), f"{document} links to {target}"
        assert not heading or heading in headings(led), f"{document} links to {target}"


def headings(path: Path) -> set[str]:
    """The anchors that GitHub gives to a document's headings."""
    found = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in found}


@pytest.mark.parametrize("module", ["llmscale.cli serve", "llmscale.node", "llmscale.gateway"])
def test_every_option_of_a_command_that_is_named_exists(module: str) -> None:
    guides = sorted((ROOT / "docs" / "guides").glob("*.md"))
    written = "\n".join([README, *(path.read_text(encoding="utf-8") for path in guides)])
    commands = [line for line in written.replace("\\\n", " ").splitlines() if COMMANDS[module] in line]
    named = {option for line in commands for option in re.findall(r"--[a-z-]+", line)}
    if module == "llmscale.cli serve":
        named |= set(re.findall(r"^\| `(--[a-z-]+)`", written, flags=re.MULTILINE))
    assert named
    known = set(re.findall(r"--[a-z-]+", run([sys.executable, "-m", *module.split(), "--help"])))
    assert not named - known


def test_the_guides_commands_for_keys_make_the_files_that_its_other_commands_name(tmp_path: Path) -> None:
    guide = (ROOT / "docs" / "guides" / "serving.md").read_text(encoding="utf-8")
    # Typed in the guide's order in one folder: API keys come before those of nodes.
    api_keys = re.findall(r"^(?:key=|echo ).*$", guide.partition("\n## Keys\n")[2], flags=re.MULTILINE)
    assert len(api_keys) == 2
    subprocess.run(["bash", "-ec", "\n".join(api_keys)], cwd=tmp_path, check=True, timeout=60)
    assert f"--api-key-file {next(tmp_path.iterdir()).name}\n" in guide
    commands = re.findall(r"^\.venv/bin/llmscale (keys .*?)(?: +#.*)?$", guide, flags=re.MULTILINE)
    assert commands
    for words in commands:
        command = [sys.executable, "-m", "llmscale.cli", *words.split()]
        subprocess.run(command, cwd=tmp_path, stdout=subprocess.DEVNULL, check=True, timeout=60)
    named = set(re.findall(r"--(?:key-file|allow-list) (\S+)", guide)) | set(re.findall(r"\$\(cat (\S+?)\)", guide))
    assert {"node.key", "allowed", "node.public"} <= named
    assert {name for name in named if not (tmp_path / "keys" / name).exists()} == set()


def test_the_guides_table_of_the_environment_has_every_variable_with_its_meaning() -> None:
    guide = (ROOT / "docs" / "guides" / "serving.md").read_text(encoding="utf-8")
    section = guide.partition("\n## Environment\n")[2].partition("\n## ")[0]
    written = re.findall(r"^\| `(\w+)` \| (.*) \| (.*) \|$", section, flags=re.MULTILINE)
    assert written == [(each.name, each.meaning, each.default) for each in VARIABLES]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_file_that_is_named_exists(document: str) -> None:
    named = set(PATH.findall((ROOT / document).read_text(encoding="utf-8")))
    assert not {name for name in named - WRITTEN_LATER if not (ROOT / name).exists()}


@pytest.mark.parametrize("document", ["docs/security.md"])
def test_every_test_that_is_named_exists(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    named = set(re.findall(r"`([a-z0-9]+(?:_[a-z0-9]+){3,})`", text))
    assert len(named) > 30, "the page names the tests behind its sentences"
    assert not named - names_of_tests()


@cache
def names_of_tests() -> frozenset[str]:
    """The names of all tests, Rust's and Python's."""
    names: set[str] = set()
    for folder, endings in ((ROOT / "tests", (".py",)), (ROOT / "rust", (".rs",))):
        for where, folders, files in os.walk(folder):
            folders[:] = [name for name in folders if name not in {"target", "__pycache__", "zmq-sys"}]
            for file in files:
                if file.endswith(endings):
                    text = (Path(where) / file).read_text(encoding="utf-8")
                    names |= set(re.findall(r"^\s*(?:async )?(?:def|fn) (\w+)", text, flags=re.MULTILINE))
    return frozenset(names)
