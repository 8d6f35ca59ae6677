"""Goal: docs/guides/two-hosts.md can be typed as it stands.

Method: every command of the guide, block by block, in a shell on the host that the block names. Hosts are network
namespaces with a folder each; their names are replaced by their addresses, and `scp` is a copy between the folders.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.network import CannotMakeHosts, Host, hosts
from tests.processes import wait_until

GUIDE = Path(__file__).parents[2] / "docs" / "guides" / "two-hosts.md"
BLOCK = re.compile(r"^```bash\n# on (\S+)\n(.*?)^```", flags=re.MULTILINE | re.DOTALL)
# What runs until it is told to end.
SERVER = re.compile(r"-m llmscale\.(?:node|gateway)")
NAMES = ("host-a", "host-b", "edge-host", "client")
# Copies between the folders of hosts; it stands where the guide's readers have their own.
SCP = """#!/bin/bash -e
words=()
for word in "$@"; do
    case "$word" in
        *:*) words+=("{folder}/${{word%%:*}}/${{word#*:}}") ;;
        *) words+=("$word") ;;
    esac
done
cp "${{words[@]}}"
"""


@dataclass(frozen=True, slots=True)
class Place:
    """The hosts by name, and the folder that has one folder for each."""

    hosts: dict[str, Host]
    folder: Path

    def command(self, name: str, script: str) -> list[str]:
        """The script on a host, with addresses for names."""
        for other, host in self.hosts.items():
            script = script.replace(other, host.address)
        return [*self.hosts[name].words, "bash", "-ec", script]

    def of(self, name: str) -> Path:
        """Where a host's user works."""
        return self.folder / self.hosts[name].address

    def environment(self) -> dict[str, str]:
        """Ours, with the copying `scp` before any other."""
        return {**os.environ, "PATH": f"{self.folder / 'bin'}{os.pathsep}{os.environ['PATH']}"}

    def run(self, name: str, script: str) -> str:
        """A block that ends by itself: what it prints."""
        done = subprocess.run(
            self.command(name, script),
            cwd=self.of(name),
            env=self.environment(),
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        assert done.returncode == 0, f"{script}\n{done.stdout}{done.stderr}"
        return done.stdout

    @contextmanager
    def running(self, name: str, script: str) -> Iterator[Path]:
        """A block whose last command runs until it is told to end: where its output goes."""
        path = self.of(name) / "output"
        with path.open("wb") as output:
            process = subprocess.Popen(
                self.command(name, script),
                cwd=self.of(name),
                env=self.environment(),
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        try:
            yield path
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                raise AssertionError(f"SIGTERM did not end it: {script}\n{path.read_text()}") from None


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    """Four hosts, each with a folder in which the package is installed."""
    with ExitStack() as running:
        try:
            made = running.enter_context(hosts("a", "b", "e", "c"))
        except CannotMakeHosts as error:
            pytest.skip(f"this machine cannot make hosts: {error}")
        places = Place(dict(zip(NAMES, made, strict=True)), tmp_path)
        for name in NAMES:
            places.of(name).mkdir()
            (places.of(name) / ".venv").symlink_to(sys.prefix)
        (tmp_path / "bin").mkdir()
        (tmp_path / "bin" / "scp").write_text(SCP.format(folder=tmp_path))
        (tmp_path / "bin" / "scp").chmod(0o755)
        yield places


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_the_guide_can_be_typed_as_it_stands(place: Place) -> None:
    blocks = BLOCK.findall(GUIDE.read_text(encoding="utf-8"))
    assert [name for name, _ in blocks] == [
        "edge-host",
        "host-a",
        "host-b",
        "edge-host",
        "client",
        "client",
        "client",
    ]
    (_, keys), *nodes, (_, gateway), (_, question), (_, story), (_, fleet) = blocks
    with ExitStack() as running:
        place.run("edge-host", keys)
        for name, script in nodes:
            assert SERVER.search(script)
            log = running.enter_context(place.running(name, script))
            wait_until(lambda log=log: "node is ready" in log.read_text(), 60, f"{name} is ready")
        log = running.enter_context(place.running("edge-host", gateway))
        wait_until(lambda: "gateway listens" in log.read_text(), 60, "the gateway listens")
        answer = json.loads(place.run("client", question))
        assert answer["usage"]["completion_tokens"] > 0

        def states() -> list[str]:
            return [one["state"] for one in json.loads(place.run("client", fleet))["replicas"]]

        wait_until(lambda: states() == ["ready"] * 2, 20, "both nodes are ready")
        check_that_a_host_can_be_taken_away(place, story, fleet)


def check_that_a_host_can_be_taken_away(place: Place, story: str, fleet: str) -> None:
    """A long answer goes on while the host that computes it has no cable, and its client sees a comment."""
    output = place.of("client") / "story"
    script = story.rstrip() + " > story"
    with place.running("client", script):

        def busy() -> list[int]:
            replicas = json.loads(place.run("client", fleet))["replicas"]
            return [number for number, one in enumerate(replicas) if one["running"]]

        wait_until(lambda: bool(busy()), 20, "a node runs the stream")
        # The gateway lists nodes in the order in which it was given them.
        with place.hosts[NAMES[busy()[0]]].unplugged():
            wait_until(lambda: "data: [DONE]" in output.read_text(), 60, "the stream has ended")
    text = output.read_text()
    assert ": restarts 1" in text
    assert '"finish_reason":"length"' in text
