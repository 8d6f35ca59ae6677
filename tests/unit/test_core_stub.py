"""The stub of the native module against the module itself: names, arguments, defaults, kinds. Method: mypy's stubtest
in a child process, because it imports what it checks.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# What stubtest must not compare, one regular expression a line, each with its reason.
ALLOWED = """\
# The module exports every name; PyO3 writes the list, and a stub needs none.
llmscale\\._core\\.__all__
# The buffer protocol is a slot of the type; before Python 3.12 it has no name that could be looked up.
llmscale\\._core\\.\\w+\\.__buffer__
"""


def stubtest(folder: Path, allowed: str) -> subprocess.CompletedProcess[str]:
    """Runs stubtest with a list of exceptions. An exception that is not needed is no failure: `__buffer__` exists from
    Python 3.12 on."""
    allow_list = folder / "allowed.txt"
    allow_list.write_text(allowed)
    command = [sys.executable, "-m", "mypy.stubtest", "llmscale._core", "--allowlist", str(allow_list)]
    return subprocess.run(
        [*command, "--ignore-unused-allowlist"],
        cwd=ROOT,
        env={**os.environ, "MYPYPATH": str(ROOT / "python")},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.timeout(400)
def test_the_stub_states_what_the_native_module_is(tmp_path: Path) -> None:
    found = stubtest(tmp_path, ALLOWED)
    assert found.returncode == 0, found.stdout + found.stderr
    assert "no issues found in 1 module" in found.stdout
