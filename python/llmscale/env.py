"""Every environment variable that llmscale reads or sets, with its meaning. Nothing else touches `os.environ`."""

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
    "LLMSCALE_CPU_LEVEL", "forces the CPU kernels down: portable, avx2, avx512 or avx512bf16", "the best there is"
)
HF_HOME = Variable("HF_HOME", "where the Hugging Face cache lies; read, never written", "~/.cache/huggingface")
LOG_FORMAT = Variable("LLMSCALE_LOG_FORMAT", "text or json", "text on a terminal, json elsewhere")

OMP_WAIT_POLICY = Variable("OMP_WAIT_POLICY", "how torch's threads wait between products", "passive")
GOMP_SPINCOUNT = Variable("GOMP_SPINCOUNT", "how long they poll before they sleep, in polls of 10 ns or so", "2000")

GLOO_INTERFACE = Variable("GLOO_SOCKET_IFNAME", "network interface between pipeline stages", "lo, on one host")

VARIABLES: tuple[Variable, ...] = (CPU_LEVEL, HF_HOME, LOG_FORMAT, OMP_WAIT_POLICY, GOMP_SPINCOUNT, GLOO_INTERFACE)


def prepare_for_torch() -> None:
    """Sets what torch's OpenMP reads when it is imported, unless the user has set it.

    By default its threads spin after every product. Beside another busy process that costs milliseconds per product
    (one row of 256 x 1024 on two busy cores: 8,000 us by default, 35 us when threads wait passively). Threads that
    sleep at once lose on a quiet machine: a 135M model on two cores gives 36 tokens/s then, 58 when they poll for the
    20 us in which the next product comes, and no more when they poll longer. Beside two busy processes both give 18.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    # By default gloo listens on the interface that the host's name leads to, which others may reach.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
