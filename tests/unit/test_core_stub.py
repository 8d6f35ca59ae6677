"""The stub of the native module against the module itself: names, arguments, defaults, kinds. Method: mypy's stubtest
in a child process, because it imports what it checks. The stub stands alone in a folder, so that mypy reads it and not
the package around it, which is half a minute of work.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
STUB = ROOT / "python/llmscale/_core.pyi"

# What stubtest must not compare, one regular expression a line, each with its reason.
ALLOWED = """\
# The module exports every name; PyO3 writes the list, and a stub needs none.
llmscale\\._core\\.__all__
# The buffer protocol is a slot of the type; before Python 3.12 it has no name that could be looked up.
llmscale\\._core\\.\\w+\\.__buffer__
"""


def stubtest(folder: Path, stub: str) -> subprocess.CompletedProcess[str]:
    """Runs stubtest on a stub. An exception that is not needed is no failure: from Python 3.12 `__buffer__` exists."""
    package = folder / "llmscale"
    package.mkdir()
    (package / "__init__.pyi").touch()
    (package / "_core.pyi").write_text(stub)
    allow_list = folder / "allowed.txt"
    allow_list.write_text(ALLOWED)
    command = [sys.executable, "-m", "mypy.stubtest", "llmscale._core", "--allowlist", str(allow_list)]
    return subprocess.run(
        [*command, "--ignore-unused-allowlist"],
        cwd=folder,
        env={**os.environ, "MYPYPATH": str(folder)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_stub_states_what_the_native_module_is(tmp_path: Path) -> None:
    found = stubtest(tmp_path, STUB.read_text())
    assert found.returncode == 0, found.stdout + found.stderr
    assert "no issues found in 1 module" in found.stdout


def test_a_stub_that_states_something_else_is_told(tmp_path: Path) -> None:
    wrong = STUB.read_text().replace("def end_with_parent(parent: int,", "def end_with_parent(child: int,")
    found = stubtest(tmp_path, wrong + "\ndef no_such_function() -> None: ...\n")
    assert found.returncode != 0
    assert "llmscale._core.no_such_function is not present at runtime" in found.stdout
    assert "end_with_parent is inconsistent" in found.stdout
