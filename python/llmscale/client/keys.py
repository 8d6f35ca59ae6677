"""CURVE keys of a client: its own pair and the public key of the node that it trusts.

Keys are 40 characters of Z85 text (ZeroMQ RFC 32) and are checked here, before a socket sees them; the secret is never
part of a `repr`. Reads and writes key files, in the format of `zmq.auth`, which nodes and gateways read too, in O(file
size). Knows nothing of sockets.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from llmscale.errors import ConfigError

_ALPHABET: Final = frozenset("0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.-:+=^!/*?&<>()[]{}@%$#")
_CHARACTERS: Final = 40
_MAX_FILE_BYTES: Final = 16 * 1024


@dataclass(frozen=True, slots=True)
class CurveKeys:
    """`public` and `secret` are this client's, `server` is the node's. Raises ConfigError for anything but keys."""

    public: str
    secret: str = field(repr=False)
    server: str

    def __post_init__(self) -> None:
        for name in ("public", "secret", "server"):
            value = getattr(self, name)
            if len(value) != _CHARACTERS or not _ALPHABET.issuperset(value):
                raise ConfigError(f"the {name} key must be {_CHARACTERS} characters of Z85 text; copy it again, whole")

    @classmethod
    def load(cls, path: str | Path, *, server: str) -> CurveKeys:
        """This client's pair from a key file that only its owner may read, and the node's public key as text."""
        public, secret = read_pair(Path(path))
        return cls(public, secret, server)


def read_pair(path: Path) -> tuple[str, str]:
    """Public and secret key of a key file that only its owner may read. Raises ConfigError."""
    try:
        mode = path.stat().st_mode & 0o777
        text = path.read_text(encoding="ascii") if path.stat().st_size <= _MAX_FILE_BYTES else ""
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the key file {path} cannot be read: {error}") from error
    if mode & 0o077:
        raise ConfigError(f"the key file {path} has mode {mode:o} and holds a secret key; run `chmod 600` on it")
    fields: dict[str, str] = {}
    for line in text.splitlines():
        name, separator, value = line.partition("=")
        if separator and name.strip() in ("public-key", "secret-key"):
            fields[name.strip()] = value.strip().strip('"')
    if len(fields) != 2:
        raise ConfigError(
            f"the key file {path} needs the lines public-key and secret-key; make it with `llmscale keys`"
        )
    return fields["public-key"], fields["secret-key"]


def write_pair(path: Path, public: str, secret: str, *, replace: bool) -> None:
    """Writes a key file that only its owner may read. Raises OSError, FileExistsError for one that is there already.

    With `replace` the old file is there, whole, until the new one is: nobody ever reads half of a pair.
    """
    target = path.with_name(path.name + ".new") if replace else path
    if replace:
        # Left by a process that died while it wrote.
        target.unlink(missing_ok=True)
    descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    with os.fdopen(descriptor, "w", encoding="ascii") as file:
        file.write(f'metadata\ncurve\n    public-key = "{public}"\n    secret-key = "{secret}"\n')
        file.flush()
        os.fsync(file.fileno())
    if replace:
        target.replace(path)
