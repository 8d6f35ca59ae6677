"""The folder of a disk tier: one file per rank of this host, an index beside them, a key, and a lock.

What lies there outlives nodes and is as sensitive as the prompts that it was computed from, so everything is of this
user alone. One process at a time owns the folder; the lock goes with it, however it ends. Deleting the folder while no
node runs deletes everything. Does not know what the files hold, and costs two files to open.
"""

from __future__ import annotations

import fcntl
import os
import secrets
from pathlib import Path

from llmscale.errors import ConfigError
from llmscale.parallel.assignment import DiskPlace

KEY_BYTES = 32


class DiskFolder:
    """Owned from its making to `close`, or to the end of the process."""

    def __init__(self, path: Path) -> None:
        """Makes the folder if there is none. Raises ConfigError if it cannot be had or belongs to another process."""
        self.path = path
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise ConfigError(f"kv_disk is {path}, which cannot be used as a folder: {error}") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._lock)
            raise ConfigError(
                f"kv_disk is {path}, which belongs to another node that runs; give every node a folder of its own"
            ) from error

    @property
    def index(self) -> str:
        """Where what the files hold is kept."""
        return str(self.path / "index")

    def place_of(self, rank: int, content: str) -> DiskPlace:
        """One rank's file, for blocks of what `content` names."""
        return DiskPlace(str(self.path / f"rank-{rank}.kv"), content)

    def secret(self) -> bytes:
        """Keys the names of contents for whoever has no fleet; drawn once. Raises ConfigError."""
        path = self.path / "key"
        try:
            if not path.exists():
                fresh = self.path / "key.new"
                descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
                with os.fdopen(descriptor, "wb") as file:
                    file.write(secrets.token_bytes(KEY_BYTES))
                fresh.rename(path)
            key = path.read_bytes()
        except OSError as error:
            raise ConfigError(f"the key of the disk tier, {path}, cannot be had: {error}") from error
        if len(key) != KEY_BYTES:
            raise ConfigError(
                f"the key of the disk tier, {path}, has {len(key)} bytes, it must have {KEY_BYTES}; delete the folder"
            )
        return key

    def close(self) -> None:
        """Lets another process have it."""
        os.close(self._lock)
