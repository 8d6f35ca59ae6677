"""A folder that is written beside the place where it will be, and is there whole or not at all.

While it is made it is hidden, named after the target, and locked (flock on the folder itself, so that nothing of it is
left in what is made); the lock goes with the process, however that ends, so that what nobody will finish can be told
from what somebody is making. O(1) but for removals. It does not know what is written.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from llmscale.errors import ConfigError

_SUFFIX_CHARACTERS = 8


def require_new(target: Path) -> None:
    """Raises ConfigError if the target exists."""
    if target.exists():
        raise ConfigError(f"{str(target)!r} exists; give a folder that does not, or remove it first")


@contextlib.contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder to write into that gets its name when the context ends well, and is gone when it does not.

    Raises ConfigError if the target exists.
    """
    require_new(target)
    making, lock = _made(target)
    try:
        yield making
        os.replace(making, target)
    except BaseException:
        # A signal may come just after it got its name.
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(making)
        raise
    finally:
        os.close(lock)


def remove_abandoned(target: Path) -> None:
    """Removes what was made for a target by processes that did not live to finish or remove it.

    Only for targets in a folder of ours: it goes by names. Where a file system cannot lock, nothing is removed.
    """
    name = re.compile(re.escape(f".{target.name}.") + f"[0-9a-f]{{{_SUFFIX_CHARACTERS}}}")
    for path in sorted(target.parent.iterdir()):
        if name.fullmatch(path.name) is None:
            continue
        # Another process makes it, or removes it faster; and what cannot be removed does not stop an import.
        with contextlib.suppress(OSError):
            lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                if _take(lock):
                    shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(lock)


def _made(target: Path) -> tuple[Path, int]:
    """A folder, and its lock."""
    while True:
        making = target.with_name(f".{target.name}.{uuid.uuid4().hex[:_SUFFIX_CHARACTERS]}")
        making.mkdir(parents=True)
        # Another process may take it for abandoned before it is locked.
        with contextlib.suppress(BlockingIOError, FileNotFoundError):
            lock = os.open(making, os.O_RDONLY | os.O_DIRECTORY)
            try:
                _take(lock)
                making.stat()
            except OSError:
                os.close(lock)
                raise
            return making, lock


def _take(lock: int) -> bool:
    """Whether the lock is ours now; not where a file system has none for folders, as NFS.

    Raises BlockingIOError where another has it.
    """
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:
        return False
    return True
