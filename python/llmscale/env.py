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
CACHE_HOME = Variable("XDG_CACHE_HOME", "where imported GGUF files and compiled CUDA kernels are kept", "~/.cache")
HF_HOME = Variable("HF_HOME", "where the Hugging Face cache lies; read, never written", "~/.cache/huggingface")
LOG_FORMAT = Variable("LLMSCALE_LOG_FORMAT", "text or json", "text on a terminal, json elsewhere")

OMP_WAIT_POLICY = Variable("OMP_WAIT_POLICY", "how torch's threads wait between products", "passive")
GOMP_SPINCOUNT = Variable("GOMP_SPINCOUNT", "how long they poll before they sleep, in polls of 10 ns or so", "2000")

OPENBLAS_THREADS = Variable("OPENBLAS_NUM_THREADS", "threads that numpy starts when it is imported; 1 in workers", "1")

GLOO_INTERFACE = Variable("GLOO_SOCKET_IFNAME", "network interface between ranks on CPUs", "the way to host 0")
NCCL_INTERFACE = Variable("NCCL_SOCKET_IFNAME", "network interface on which GPUs of several hosts meet", "the same")

LAUNCHER_VARIABLES: tuple[Variable, ...] = (
    Variable("GROUP_RANK", "torchrun: which host this is", "--host-index"),
    Variable("NODE_RANK", "scripts around torchrun: the same", "--host-index"),
    Variable("GROUP_WORLD_SIZE", "torchrun: how many hosts", "--hosts"),
    Variable("NNODES", "scripts around torchrun: the same", "--hosts"),
    Variable("RANK", "torchrun: which process this is of all; checked", "none"),
    Variable("WORLD_SIZE", "torchrun: how many processes; checked", "none"),
    Variable("LOCAL_RANK", "torchrun: which process of this host; the first one acts", "0"),
    Variable("LOCAL_WORLD_SIZE", "torchrun: how many processes per host; checked", "1"),
    Variable("MASTER_ADDR", "torchrun: address of host 0", "--leader"),
    Variable("MASTER_PORT", "torchrun: a port that is taken", "none"),
    Variable("LWS_WORKER_INDEX", "LeaderWorkerSet: which host this is", "--host-index"),
    Variable("LWS_GROUP_SIZE", "LeaderWorkerSet: how many hosts", "--hosts"),
    Variable("LWS_LEADER_ADDRESS", "LeaderWorkerSet: address of host 0", "--leader"),
    Variable("SLURM_NODEID", "Slurm: which host of the step this is", "--host-index"),
    Variable("SLURM_STEP_NUM_NODES", "Slurm: how many hosts the step has", "--hosts"),
    Variable("SLURM_STEP_NODELIST", "Slurm: hosts of the step, of which the first one leads", "--leader"),
    Variable("SLURM_JOB_NODELIST", "Slurm: the same of the job, for a step that has no list", "--leader"),
    Variable("SLURM_LOCALID", "Slurm: which task of this host; the first one acts", "0"),
)
"""Of a node's launcher; flags in their place."""

VARIABLES: tuple[Variable, ...] = (
    CPU_LEVEL,
    CACHE_HOME,
    HF_HOME,
    LOG_FORMAT,
    OMP_WAIT_POLICY,
    GOMP_SPINCOUNT,
    OPENBLAS_THREADS,
    GLOO_INTERFACE,
    NCCL_INTERFACE,
    *LAUNCHER_VARIABLES,
)


def launcher_environment() -> dict[str, str]:
    """What a launcher has set."""
    values = {variable.name: variable.read() for variable in LAUNCHER_VARIABLES}
    return {name: value for name, value in values.items() if value is not None}


def prepare_for_torch() -> None:
    """Sets what torch's OpenMP and numpy read when they are imported, unless the user has set it.

    By default its threads spin after every product. Beside another busy process that costs milliseconds per product
    (one row of 256 x 1024 on two busy cores: 8,000 us by default, 35 us when threads wait passively). Threads that
    sleep at once lose on a quiet machine: a 135M model on two cores gives 36 tokens/s then, 58 when they poll for the
    20 us in which the next product comes, and no more when they poll longer. Beside two busy processes both give 18.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    # Nothing here asks numpy for products.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


def keep_numpy_to_one_thread() -> None:
    """Before numpy is imported in a process that will be copied: with a second thread it cannot be. What the user has
    set is for programs that multiply with numpy; a worker never does."""
    os.environ["OPENBLAS_NUM_THREADS"] = "1"


def prepare_for_torch_distributed(interface: str) -> None:
    """Sets where ranks listen for each other, unless the user has set it: read when a process group is made.

    By default gloo listens on the interface that the host's name leads to, which may be another network, or loopback.
    """
    os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    os.environ.setdefault("NCCL_SOCKET_IFNAME", interface)
