"""Prints the dependencies of pyproject.toml, with those of the extras named on the command line, one per line."""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path


def main() -> None:
    """Reads the project file beside this folder."""
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
    wanted = list(project["dependencies"])
    for extra in sys.argv[1:]:
        wanted += project["optional-dependencies"][extra]
    sys.stdout.write("\n".join(wanted) + "\n")


if __name__ == "__main__":
    main()
