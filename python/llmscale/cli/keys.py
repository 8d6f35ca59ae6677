"""`llmscale keys`: CURVE key pairs for a fleet, and the list of those that its nodes admit.

One folder holds everything that an operator hands out: `node.key` and `node.public`, one key file for each gateway and
client, and `allowed`, the nodes' allow-list. O(keys asked for and listed). It starts nothing, and knows neither
sockets nor which processes use a key now.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import zmq

from llmscale.client.keys import write_pair
from llmscale.errors import ConfigError

NODE: Final = "node"
_NAME: Final = re.compile(r"[A-Za-z0-9._-]{1,64}")
_MAX_ALLOWED_BYTES: Final = 16 << 20


@dataclass(frozen=True, slots=True)
class Holder:
    """Who holds a key: the nodes together, a gateway by its name, or a client by its name and tenant."""

    role: str
    name: str = ""
    tenant: str | None = None

    @classmethod
    def parse(cls, text: str) -> Holder:
        """`node`, `gateway:NAME` or `client:NAME:TENANT`, the form in which a node names its peers."""
        role, *names = text.split(":")
        if (role, len(names)) not in {(NODE, 0), ("gateway", 1), ("client", 2)}:
            raise ConfigError(f"{text!r} is no holder of a key: write node, gateway:NAME or client:NAME:TENANT")
        for name in names:
            if not _NAME.fullmatch(name):
                raise ConfigError(f"{name!r} in {text!r} is no name: take 1 to 64 letters, digits, '.', '_' or '-'")
        return cls(role, *names)

    @property
    def file_name(self) -> str:
        """What its key file is called."""
        return f"{self.role}-{self.name}.key" if self.name else f"{self.role}.key"

    @property
    def words(self) -> list[str]:
        """The beginning of its line in the allow-list."""
        return [word for word in (self.role, self.name, self.tenant) if word]


def run(folder: Path, holders: Sequence[str], *, force: bool) -> None:
    """Makes a pair for every holder. Raises ConfigError before anything is written when a file would be overwritten.

    With `force`, pairs that exist are replaced and their holders' lines of the list too. Without, a line of the same
    holder stays: two keys of one name are how a key is changed without a gap.
    """
    wanted = list(dict.fromkeys(Holder.parse(text) for text in holders))
    names = [holder.file_name for holder in wanted]
    if len(set(names)) < len(names):
        raise ConfigError("two of the holders have one name in different tenants; give each client a name of its own")
    existing = [name for name in names if (folder / name).exists()]
    if existing and not force:
        raise ConfigError(
            f"{', '.join(existing)} in {folder} would be overwritten, which locks out whoever uses the old key;"
            " name other holders, or replace them with --force"
        )
    listed = _read_allowed(folder / "allowed")
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for holder in wanted:
            public = _make(folder / holder.file_name, replace=force)
            if holder.role == NODE:
                _write_public(folder / "node.public", public)
            else:
                if force:
                    listed = [line for line in listed if line.split()[:2] != holder.words[:2]]
                listed.append(" ".join([*holder.words, public]))
        _write_public(folder / "allowed", "\n".join(listed))
    except OSError as error:
        raise ConfigError(f"the keys cannot be written: {error}") from error
    sys.stdout.write(_advice(folder, wanted))


def _make(path: Path, *, replace: bool) -> str:
    """Writes a new pair and returns its public half."""
    public, secret = (key.decode("ascii") for key in zmq.curve_keypair())
    write_pair(path, public, secret, replace=replace)
    return public


def _read_allowed(path: Path) -> list[str]:
    """The lines of an allow-list that is there already, comments and blank lines included."""
    try:
        if path.stat().st_size > _MAX_ALLOWED_BYTES:
            raise ConfigError(f"the allow-list {path} is over {_MAX_ALLOWED_BYTES} bytes; no node would read it")
        return path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the allow-list {path} cannot be read: {error}") from error


def _write_public(path: Path, text: str) -> None:
    """Replaces a file that is no secret in one step, so that a node that starts now reads the old one or the new."""
    beside = path.with_name(path.name + ".new")
    beside.write_text(text + "\n" if text else "", encoding="utf-8")
    os.replace(beside, path)


def _advice(folder: Path, made: Sequence[Holder]) -> str:
    """What to do next, in commands of which only hosts and models need to be changed."""
    lines = [f"{folder / holder.file_name}: the key pair of {':'.join(holder.words)}" for holder in made]
    lines.append("The .key files are secret: copy each to the host that uses it, with mode 600, and nowhere else.")
    lines.append(f"\nOn every host of a node, with node.key and allowed from {folder}:")
    lines.append(
        "  python -m llmscale.node --model MODEL --listen tcp://0.0.0.0:7000"
        f" --key-file {folder}/node.key --allow-list {folder}/allowed"
    )
    lines.append("Nodes read the list when they start: start them again after a change.")
    if not (folder / "node.public").exists():
        lines.append(f"There is no pair for nodes in {folder} yet: llmscale keys {folder} node")
        return "\n".join(lines) + "\n"
    for holder in made:
        key_file = f"{folder}/{holder.file_name}"
        if holder.role == "gateway":
            lines.append(f"\nWhere the gateway {holder.name} runs, with its .key file and node.public:")
            lines.append(
                "  python -m llmscale.gateway --model MODEL --nodes tcp://HOST:7000"
                f' --key-file {key_file} --node-key="$(cat {folder}/node.public)"'
            )
        elif holder.role == "client":
            server = (folder / "node.public").read_text(encoding="ascii").strip()
            lines.append(f"\nIn the client {holder.name}, whose tenant is {holder.tenant}:")
            lines.append("  from llmscale.client import CurveKeys")
            lines.append(f'  Client("tcp://HOST:7000", keys=CurveKeys.load("{key_file}", server="{server}"))')
    return "\n".join(lines) + "\n"
