"""Packages that the base install lacks, and the one sentence that says how to get them.

Looks for them in O(packages) and imports none, so that a command can refuse before it has begun. It does not know what
they are needed for.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Final

NODE_PACKAGES: Final = ("torch", "numpy", "safetensors")
"""Of the extra "node": what computes without the native executor, and what makes checkpoints."""
GGUF_PACKAGES: Final = ("gguf",)


def lacking(packages: Sequence[str], *extras: str) -> str | None:
    """Which of `packages` are not installed, and how `extras` of this project bring them; None where all are there."""
    missing = [name for name in packages if find_spec(name) is None]
    if not missing:
        return None
    # No index has llmscale, so the extras have to come from where the project lies.
    verb = "is" if len(missing) == 1 else "are"
    return f"{', '.join(missing)} {verb} not installed; from the checkout: pip install '.[{','.join(extras)}]'"
