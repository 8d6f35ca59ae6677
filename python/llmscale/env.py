"""Every environment variable that llmscale reads, with its meaning. Nothing else in the package touches `os.environ`."""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Variable:
    """A variable, its meaning, and what holds where it is not set."""

    name: str
    meaning: str
    default: str

    def read(self) -> str | None:
        """The value, or None where it is unset or empty."""
        return os.environ.get(self.name) or None


CPU_LEVEL = Variable(
    "LLMSCALE_CPU_LEVEL", "forces the CPU kernels down to portable, avx2, avx512 or avx512bf16", "the best there is"
)
HF_HOME = Variable("HF_HOME", "where the Hugging Face cache lies; read for hub ids, never written", "~/.cache/huggingface")
LOG_FORMAT = Variable("LLMSCALE_LOG_FORMAT", "text or json", "text on a terminal, json elsewhere")

VARIABLES: tuple[Variable, ...] = (CPU_LEVEL, HF_HOME, LOG_FORMAT)
