"""Goal: docs/guides/fleet-file.md can be typed as it stands, its tables are the truth, and the example runs.

Method: the guide's own blocks in a shell, in a folder where the package is installed in `.venv`; only addresses differ,
and host-b is this machine.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import msgspec
import pytest

from llmscale.errors import ConfigError
from llmscale.fleet_file import FleetFile, GatewayEntry, KeysEntry, LimitsEntry, ModelEntry, parse_fleet_file
from llmscale.gateway.config import GatewayLimits
from tests.processes import free_port, serving_fleet, wait_until

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs" / "guides" / "fleet-file.md").read_text(encoding="utf-8")
EXAMPLE = ROOT / "examples" / "several_models"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", GUIDE, flags=re.MULTILINE | re.DOTALL)


@contextmanager
def running(script: str, folder: Path) -> Iterator[Path]:
    """A command that runs until it is told to end: where its output goes."""
    path = folder / "output"
    with path.open("wb") as output:
        process = subprocess.Popen(
            ["bash", "-ec", f"exec {script}"], cwd=folder, stdout=output, stderr=output, start_new_session=True
        )
    try:
        yield path
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise AssertionError(f"SIGTERM did not end it: {script}\n{path.read_text()}") from None


def run(script: str, folder: Path) -> str:
    done = subprocess.run(["bash", "-ec", script], cwd=folder, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, f"{script}\n{done.stdout}{done.stderr}"
    return done.stdout


def command(script: str) -> str:
    """A block of one command on one line, without its comments."""
    lines = [line for line in script.replace("\\\n", " ").splitlines() if not line.startswith("#")]
    assert len(lines) == 1
    return lines[0]


def is_ready(port: int) -> bool:
    try:
        return httpx2.get(f"http://127.0.0.1:{port}/health/ready", timeout=60).status_code == 200
    except httpx2.TransportError:
        return False


def models_of_replicas(port: int) -> list[str]:
    """One name for every replica that is ready."""
    replicas = httpx2.get(f"http://127.0.0.1:{port}/fleet", timeout=60).json()["replicas"]
    return sorted(replica["model"] for replica in replicas if replica["state"] == "ready")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where the guide's reader works."""
    (tmp_path / ".venv").symlink_to(sys.prefix)
    return tmp_path


def test_two_models_on_one_machine_answer_as_the_guide_says(folder: Path) -> None:
    port = free_port()
    file, start, ask = blocks("toml")[0], blocks("bash")[0], blocks("bash")[1]
    (folder / "llmscale.toml").write_text(file.replace("8000", str(port)))
    with running(command(start), folder) as log:
        wait_until(lambda: is_ready(port), 120, f"both models are ready\n{log.read_text()}")
        listed, answer = run(ask.replace("8000", str(port)).replace("\ncurl", "\necho; curl"), folder).splitlines()
        wait_until(
            lambda: models_of_replicas(port) == ["mini", "tiny-chat", "tiny-chat"], 120, "all replicas are ready"
        )
    assert [model["id"] for model in json.loads(listed)["data"]] == ["tiny-chat", "mini"]
    assert json.loads(answer)["choices"][0]["message"]["content"] == "68"


def test_a_model_on_another_host_is_served_as_the_guide_says(folder: Path) -> None:
    port, node_port = free_port(), free_port()
    keys, node = blocks("bash")[2], blocks("bash")[3]
    run(keys, folder)
    host_b = folder / "host-b"
    host_b.mkdir()
    for name in ("node.key", "allowed"):
        (host_b / name).write_bytes((folder / "keys" / name).read_bytes())
        (host_b / name).chmod(0o600)
    (host_b / ".venv").symlink_to(sys.prefix)
    file = blocks("toml")[1].replace("host-b:7000", f"127.0.0.1:{node_port}")
    (folder / "llmscale.toml").write_text(f"[gateway]\nport = {port}\n{file}")
    with (
        running(command(node).replace("7000", str(node_port)), host_b) as node_log,
        running(command(blocks("bash")[0]), folder) as log,
    ):
        wait_until(lambda: is_ready(port), 120, f"both are ready\n{log.read_text()}{node_log.read_text()}")
        # The second of the guide's two questions.
        question = "curl" + blocks("bash")[1].split("\ncurl")[1]
        answer = run(question.replace("8000", str(port)), folder)
    assert json.loads(answer)["choices"][0]["message"]["content"] == "68"


def test_the_tables_name_everything_with_its_default() -> None:
    written = dict(re.findall(r"^\| `(\w+)` \| (.*?) \|", GUIDE, flags=re.MULTILINE))
    for kind in (ModelEntry, GatewayEntry, KeysEntry, LimitsEntry):
        for field in msgspec.structs.fields(kind):
            if field.name == "limits":
                continue
            default: Any = getattr(GatewayLimits(), field.name) if kind is LimitsEntry else field.default
            said = written.pop(field.name)
            if field.required:
                assert said == "needed"
            elif default is not None and default != ():
                assert said == f"`{json.dumps(default)}`", field.name
    assert written == {}, "the tables have names that are none"
    assert {field.name for field in msgspec.structs.fields(FleetFile)} == {"fleet", "gateway", "keys", "models"}


def test_the_error_that_the_guide_shows_is_what_its_mistake_gives() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_fleet_file(blocks("toml")[0].replace("replicas", "replcas"), Path("llmscale.toml"))
    assert blocks("text") == [f"{caught.value}\n"]


def test_the_example_asks_every_model_of_its_file(tmp_path: Path) -> None:
    models = "".join((EXAMPLE / "llmscale.toml").read_text().partition("[models")[1:])
    with serving_fleet(tmp_path, models) as server:
        script = [sys.executable, str(EXAMPLE / "ask.py"), server.base]
        done = subprocess.run(script, capture_output=True, text=True, check=True, timeout=300)
    assert done.stdout.splitlines() == ["tiny-chat: 68", "mini: 68"]
