"""Folders that GGUF files have been imported to, by what the files hold: a file is imported once per machine.

The key is a digest of the file's size, its header and sixty-four pages of its data, so that a renamed file is found
again and a retrained one is not mistaken. Importing needs torch, so it is done in a child process: nodes and gateways
stay without it. Folders lie below XDG_CACHE_HOME and may be deleted at any time. It does not know what is in a file.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

from llmscale import env, errors
from llmscale._core import end_with_parent
from llmscale.errors import ConfigError, InvalidCheckpoint, LlmscaleError
from llmscale.extras import NODE_PACKAGES, lacking
from llmscale.models.end_signals import unwound_by_signals
from llmscale.models.gguf_header import read_gguf_header
from llmscale.models.new_folder import remove_abandoned

PAGES = 64
PAGE_BYTES = 4_096
SCHEME = b"gguf-import-2"
"""Another one whenever an import gives other bytes."""
MAX_IMPORT_SECONDS = 4 * 3_600.0
MAX_END_SECONDS = 30.0
"""For a child to remove its folder."""
_log = logging.getLogger(__name__)
_PROBLEM = 3
"""Exit code of the child for an error that its output describes."""


def imported_folder(file: Path) -> Path:
    """The folder of an imported file; imports it where that has not been done. Raises ModelError and ConfigError."""
    home = Path(env.CACHE_HOME.read() or "~/.cache").expanduser()
    target = home / "llmscale" / "gguf" / _key(file)
    if target.is_dir():
        return target
    if (lack := lacking(NODE_PACKAGES, "node", "gguf")) is not None:
        raise ConfigError(
            f"{file.name!r} is imported before it is served, which needs more than the base install: {lack}"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(target)
    code, said, logged = _imported(file, target)
    if target.is_dir():
        # Also where another process was faster and this one found the folder there.
        _log.info("imported %s into %s: %s", file.name, target, said)
        return target
    if code == _PROBLEM:
        problem = json.loads(said)
        kind = getattr(errors, problem["error"])
        assert issubclass(kind, LlmscaleError), kind
        raise kind(problem["message"])
    raise InvalidCheckpoint(f"{str(file)!r} could not be imported, its process ended with {code}: {logged[-400:]}")


def _imported(file: Path, target: Path) -> tuple[int, str, str]:
    """What the child ended with, said and logged. Raises InvalidCheckpoint if it takes too long."""
    command = [sys.executable, "-m", "llmscale.models.gguf_cache", str(file), str(target), str(os.getpid())]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:  # noqa: S603  # ours
        try:
            said, logged = child.communicate(timeout=MAX_IMPORT_SECONDS)
        except BaseException as error:
            # It removes what it has written, and is not waited for longer than that takes.
            child.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.communicate(timeout=MAX_END_SECONDS)
            child.kill()
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            raise InvalidCheckpoint(
                f"{str(file)!r} was not imported within {MAX_IMPORT_SECONDS:,.0f} s (MAX_IMPORT_SECONDS). Import it"
                " once with llmscale quantize FILE OUT --method keep, which may take longer, and serve OUT."
            ) from error
    return child.returncode, said, logged


def _key(file: Path) -> str:
    header = read_gguf_header(file)
    digest = hashlib.sha256(SCHEME)
    with file.open("rb") as data:
        size = data.seek(0, 2)
        digest.update(size.to_bytes(8, "little"))
        data.seek(0)
        digest.update(data.read(header.data_begin))
        last = max(0, size - PAGE_BYTES)
        for page in range(PAGES):
            data.seek(last * page // (PAGES - 1))
            digest.update(data.read(PAGE_BYTES))
    return digest.hexdigest()[:32]


def main(file: Path, target: Path, parent: int) -> int:
    """The child: imports, or says what is wrong as one JSON object."""
    with unwound_by_signals():
        try:
            # Nobody is there for what it writes after the end of the process that asked, which may have been killed.
            end_with_parent(parent, gently=True)
            from llmscale.models.gguf_import import import_gguf

            sys.stdout.write(str(import_gguf(file, target)))
        except LlmscaleError as error:
            sys.stdout.write(json.dumps({"error": type(error).__name__, "message": str(error)}))
            return _PROBLEM
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])))
