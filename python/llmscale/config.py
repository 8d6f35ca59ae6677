"""Settings of a node and bounds of a fleet, frozen and checked once. What a user may set has a default that needs no
thought; what follows from the model is worked out in `node/plan.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from llmscale.errors import ConfigError

DTYPES = ("auto", "bfloat16", "float32")
DEVICES = ("auto", "cpu", "cuda")
EXECUTORS = ("auto", "native", "torch")
# Of keys and values; auto: as the activations.
KV_DTYPES = ("auto", "int8")
# Of weights that the checkpoint has dense. int4 has groups of 32 inputs with one scale, unless the name says otherwise.
QUANTIZATIONS = ("int8", "int4", "int4-64", "int4-128")
MAX_STEP_SECONDS = 3_600.0
MAX_STEP_TARGET_MILLISECONDS = 60_000.0
MAX_THREADS = 1_024
"""Of a worker."""
# The longest that a frame carries (docs/wire.md): a process that sends a longer one ends.
MAX_NAME_BYTES = 256
# From SIGTERM to a node until it ends whatever still runs.
MAX_DRAIN_SECONDS = 30.0
# On one machine, of all models together.
MAX_REPLICAS = 64
# As many as a front has room for.
MAX_NODES = 256
# Seven reports of a node, so that a lost one is seen within 2 s.
USUAL_NODE_SILENCE_SECONDS = 1.75
# Four reports of a node. Below that, a busy host is taken for a dead one.
LEAST_NODE_SILENCE_SECONDS = 1.0
MOST_NODE_SILENCE_SECONDS = 600.0
# How long a front leaves a replica alone that answers badly, the first time; doubled each time: nobody needs the most.
USUAL_EJECTION_SECONDS = 5.0
LEAST_EJECTION_SECONDS = 0.1
MOST_EJECTION_SECONDS = 600.0
# Rows of all steps that may be in flight, which are two, or one per pipeline stage: the core's MAX_ROWS_IN_FLIGHT.
MAX_ROWS_IN_FLIGHT = 1 << 15
MAX_SEQUENCES = MAX_ROWS_IN_FLIGHT // 2
MAX_STEP_TOKENS = 1 << 20
# What `LLM` and fleet files call settings that have another name within, and so the option.
_OPTIONS = {
    "max_sequence_tokens": "max_model_len",
    "max_sequences": "max_num_seqs",
    "max_step_tokens": "max_num_batched_tokens",
}


def setting_name(name: str) -> str:
    """A setting of a node as errors name it: with the words that whoever set it has used, where these are others."""
    option = _OPTIONS.get(name)
    return name if option is None else f"{name} ({option}, --{option.replace('_', '-')})"


def check_threads(threads: int | None) -> None:
    """None is as many as the machine has. Raises ConfigError."""
    if threads is not None and not 1 <= threads <= MAX_THREADS:
        # Kernels that are given none wait for the first of them for ever.
        raise ConfigError(f"threads is {threads}, it must be from 1 to {MAX_THREADS:,}")


def check_name(setting: str, name: str) -> None:
    """A name that nodes and gateways tell each other. Raises ConfigError."""
    size = len(name.encode(errors="surrogatepass"))
    if not 1 <= size <= MAX_NAME_BYTES:
        begins = f", it begins with {name[:32]!r}" if name else ""
        raise ConfigError(f"{setting} has {size} bytes of UTF-8, it must have from 1 to {MAX_NAME_BYTES}{begins}")


@dataclass(frozen=True, slots=True)
class NodeSettings:
    """How a node serves one model."""

    model: str
    """A folder, a hub id in the local cache, or the name of an embedded model."""
    listen: str
    """Where fronts connect: tcp://HOST:PORT or ipc://PATH."""
    served_name: str | None = None
    """What clients call the model; None: as in `model`, a folder by its last part."""
    dtype: str = "auto"
    quantization: str | None = None
    """What dense weights become while they are loaded, one of `QUANTIZATIONS`; None: as the checkpoint has them."""
    kv_dtype: str = "auto"
    """What keys and values are kept as, one of `KV_DTYPES`: int8 takes little more than half of bfloat16's memory."""
    max_sequence_tokens: int | None = None
    """None: what the model allows, or what a quarter of the memory holds."""
    max_sequences: int = 256
    max_step_tokens: int = 512
    kv_cache_bytes: int | None = None
    """None: room for about 64k tokens, at most this replica's part of a quarter of the machine's memory."""
    kv_host_bytes: int | None = None
    """Memory of the host that takes what the KV cache evicts; 0 for none. None: four times the KV cache, at most an
    eighth of the machine's memory, which `replicas_here` share too; pages that are never written take none."""
    replicas_here: int = 1
    """How many replicas there are on this host, this one included: what is taken of its memory unasked is for all."""
    device: str = "auto"
    """What workers compute on, one of `DEVICES`; auto: CUDA where torch sees a device for each, else the CPU."""
    executor: str = "auto"
    """What computes steps, one of `EXECUTORS`; auto: native for one rank on the CPU that it can run, else torch."""
    first_device: int = 0
    """Of this host's devices, the one that this node's first rank takes; the others follow."""
    kv_disk: Path | None = None
    """A folder for what the host tier has no room for, which outlives nodes; of one node at a time. None for none."""
    kv_disk_bytes: int | None = None
    """Most bytes there. None: four times the host tier."""
    threads: int | None = None
    """CPU threads of a worker; None: its share of `cpus`, fewer for a small model."""
    cpus: int | None = None
    """CPUs that this host's workers of the replica share where `threads` is None; None: all that the node may use."""
    spare_worker: bool = True
    """Whether as many processes as ranks wait with torch imported, to take over from dead workers."""
    tensor_parallel_size: int = 1
    """Ranks that share every layer."""
    pipeline_parallel_size: int = 1
    """Stages that the layers are divided into."""
    fleet: str = "llmscale"
    max_fronts: int = 64
    max_step_seconds: float = 120.0
    """A worker whose step takes longer is hung: it is killed, and its sequences are computed again."""
    step_target_milliseconds: float = 20.0
    """What prompts may add to a step that streams wait for, by prediction: this, or as much as the streams take. A step
    without streams may take four times as long. 0 for no bound but `max_step_tokens`."""
    key_file: Path | None = None
    """The node's CURVE key pair; needed to listen beyond this machine."""
    allow_list: Path | None = None
    """Public keys of those who may connect."""
    max_saving_seconds: float = 5.0
    """How long a drain may write what is cached above the disk tier, once nothing runs any more; 0 for not at all."""
    max_join_seconds: float = 120.0
    """How long the hosts of one replica wait for each other before one gives up and says for whom it waited."""

    def __post_init__(self) -> None:
        for name, allowed in (
            ("dtype", DTYPES),
            ("quantization", (None, *QUANTIZATIONS)),
            ("kv_dtype", KV_DTYPES),
            ("device", DEVICES),
            ("executor", EXECUTORS),
        ):
            given = getattr(self, name)
            if given not in allowed:
                raise ConfigError(f"{name} is {given!r}, it must be one of {', '.join(filter(None, allowed))}")
        for name in (
            "max_sequences",
            "max_step_tokens",
            "max_fronts",
            "max_step_seconds",
            "max_join_seconds",
            "replicas_here",
            "tensor_parallel_size",
            "pipeline_parallel_size",
        ):
            # Not `<= 0`, which a NaN passes.
            if not getattr(self, name) > 0:
                raise ConfigError(f"{setting_name(name)} is {getattr(self, name)}, it must be above 0")
        self._check_steps()
        check_name("fleet", self.fleet)
        if self.served_name is not None:
            check_name("served_name (--served-name)", self.served_name)
        check_threads(self.threads)
        if self.cpus is not None and self.cpus < 1:
            raise ConfigError(f"cpus is {self.cpus}, it must be 1 or more")
        if self.first_device < 0:
            raise ConfigError(f"first_device is {self.first_device}, it must be 0 or more")
        self._check_tiers()
        if self.max_join_seconds > MAX_STEP_SECONDS:
            raise ConfigError(f"max_join_seconds is {self.max_join_seconds:g}, it must be at most {MAX_STEP_SECONDS:g}")
        if not 0 <= self.max_saving_seconds <= MAX_DRAIN_SECONDS:
            limit = f"0 to {MAX_DRAIN_SECONDS:g}, the time of a whole drain"
            raise ConfigError(f"max_saving_seconds is {self.max_saving_seconds:g}, it must be {limit}")
        if (self.key_file is None) != (self.allow_list is None):
            raise ConfigError("key_file and allow_list belong together: set both, or neither to stay on loopback")

    def _check_steps(self) -> None:
        for name, most in (("max_sequences", MAX_SEQUENCES), ("max_step_tokens", MAX_STEP_TOKENS)):
            if getattr(self, name) > most:
                raise ConfigError(f"{setting_name(name)} is {getattr(self, name):,}, it must be at most {most:,}")
        if self.max_step_seconds > MAX_STEP_SECONDS:
            raise ConfigError(f"max_step_seconds is {self.max_step_seconds:g}, it must be at most {MAX_STEP_SECONDS:g}")
        if not 0 <= self.step_target_milliseconds <= MAX_STEP_TARGET_MILLISECONDS:
            limit = f"0, for no bound, to {MAX_STEP_TARGET_MILLISECONDS:g}"
            raise ConfigError(f"step_target_milliseconds is {self.step_target_milliseconds:g}, it must be {limit}")

    def _check_tiers(self) -> None:
        if self.kv_host_bytes is not None and self.kv_host_bytes < 0:
            raise ConfigError(f"kv_host_bytes is {self.kv_host_bytes}, it must be 0, for no host tier, or more")
        if self.kv_disk_bytes is not None and self.kv_disk is None:
            raise ConfigError(
                f"kv_disk_bytes is {self.kv_disk_bytes} and kv_disk is unset; name a folder, or unset both"
            )
        if self.kv_disk_bytes is not None and self.kv_disk_bytes <= 0:
            raise ConfigError(
                f"kv_disk_bytes is {self.kv_disk_bytes}, it must be above 0; unset kv_disk for no disk tier"
            )
        if self.kv_disk is not None and self.kv_host_bytes == 0:
            raise ConfigError("kv_disk is set and kv_host_bytes is 0: what comes from the disk comes by the host tier")
