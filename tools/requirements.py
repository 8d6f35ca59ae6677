"""Prints the dependencies of pyproject.toml, with those of the extras named on the command line, one per line.

`--only` as the first word leaves out the project's own.
"""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path


def main() -> None:
    """Reads the project file beside this folder."""
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
    extras = [word for word in sys.argv[1:] if word != "--only"]
    wanted = [] if "--only" in sys.argv[1:] else list(project["dependencies"])
    for extra in extras:
        wanted += project["optional-dependencies"][extra]
    sys.stdout.write("\n".join(wanted) + "\n")


if __name__ == "__main__":
    main()
