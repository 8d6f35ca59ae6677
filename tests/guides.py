"""A guide as a script: its commands, block by block, in a shell on the host that the block names.

Hosts are network namespaces with a folder each, in which the package is installed; their names in the text are replaced
by their addresses, and `scp` is a copy between the folders. It does not know what a guide is about.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.network import CannotMakeHosts, Host, hosts

GUIDES = Path(__file__).parents[1] / "docs" / "guides"
BLOCK = re.compile(r"^```bash\n# on (\S+)\n(.*?)^```", flags=re.MULTILINE | re.DOTALL)
# What runs until it is told to end.
SERVER = re.compile(r"-m llmscale\.(?:node|gateway)")
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


def blocks_of(guide: str) -> list[tuple[str, str]]:
    """(host, script) of every block that names a host."""
    return BLOCK.findall((GUIDES / guide).read_text(encoding="utf-8"))


@contextmanager
def typing_place(folder: Path, names: Sequence[str]) -> Iterator[Place]:
    """Hosts by these names. Skips the test where none can be made."""
    with ExitStack() as running:
        try:
            made = running.enter_context(hosts(*"abcdefgh"[: len(names)]))
        except CannotMakeHosts as error:
            pytest.skip(f"this machine cannot make hosts: {error}")
        places = Place(dict(zip(names, made, strict=True)), folder)
        for name in names:
            places.of(name).mkdir()
            (places.of(name) / ".venv").symlink_to(sys.prefix)
        (folder / "bin").mkdir()
        (folder / "bin" / "scp").write_text(SCP.format(folder=folder))
        (folder / "bin" / "scp").chmod(0o755)
        yield places
