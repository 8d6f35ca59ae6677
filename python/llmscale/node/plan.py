"""From settings and a model folder to the sizes of a replica: KV blocks, longest sequence, ids that end it.

Reads the model's description and its checkpoint's headers, no weights and no torch. It does not start anything.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import msgspec

from llmscale import machine
from llmscale._core import EngineLimits
from llmscale.config import MAX_ROWS_IN_FLIGHT, NodeSettings, setting_name
from llmscale.devices.registry import choose, cuda_devices
from llmscale.errors import ConfigError
from llmscale.extras import NODE_PACKAGES, lacking
from llmscale.models.checkpoint import compute_dtype, match_tensors, open_checkpoint
from llmscale.models.fingerprint import tokenizer_digest, weights_fingerprint
from llmscale.models.kv_rows import row_bytes
from llmscale.models.locate import locate_model, model_name
from llmscale.models.native import native_refusal
from llmscale.models.registry import describe_model
from llmscale.models.shard import shard_model
from llmscale.models.spec import ModelSpec
from llmscale.parallel.layout import HostLayout

BLOCK_TOKENS = 32
# 64k tokens are 32 conversations of 2,048; beyond that the cache is there for reuse, and a quarter of the memory is a
# share that leaves a laptop usable.
DEFAULT_KV_TOKENS = 65_536
MAX_MEMORY_SHARE = 4
# Below it conversations do not fit: a machine whose share holds less gives more of its memory.
LEAST_SEQUENCE_TOKENS = 2_048
# 33 million tokens: as many as anybody's steps can name, where a device has room for more.
MAX_DEVICE_BLOCKS = 1 << 20
# The engine keeps some 100 bytes about each: half a billion tokens.
MAX_POOL_BLOCKS = 1 << 24
# What is evicted goes to memory that is taken page by page as it is written.
HOST_BLOCKS_PER_BLOCK = 4
MAX_HOST_MEMORY_SHARE = 8
# A file of the size of the host tier's memory would only hold what that holds.
DISK_BLOCKS_PER_HOST_BLOCK = 4
# What a part of a block takes beside its bytes, at most: its header and the rest of a page.
DISK_PAGE_BYTES = 4_096 + 32
# What the index keeps of a block: its name, its parent's, two hashes, ids and a checksum.
DISK_RECORD_BYTES = 88 + 4 * BLOCK_TOKENS
# Threads meet after every product, so a small model is no faster with more: tiny-chat (9 MB) gives one stream 880
# tokens/s with one thread and 830 with two, alone on two cores; beside a gateway and its clients the loss is larger.
BYTES_PER_THREAD = 16 << 20


@dataclass(frozen=True, slots=True)
class ReplicaPlan:
    """What a node serves and how large it is."""

    folder: Path
    name: str
    dtype: str
    """bfloat16 or float32: "auto" is decided."""
    quantization: str | None
    """What dense weights become while they are loaded."""
    kv_dtype: str
    """What keys and values are kept as: int8, or auto for the format of the activations."""
    limits: EngineLimits
    sequence_reason: str
    """Why sequences have no more tokens than the limits say."""
    weights_digest: bytes
    tokenizer_digest: bytes
    revision: str
    block_bytes: int
    weight_bytes: int
    """Of the checkpoint: what a step of a single sequence reads."""
    configuration_digest: bytes
    """Of what the folder says about the model's layers and the ids that end a sequence."""
    layout: HostLayout
    max_step_seconds: float
    """How long a step may take: what a rank waits for in one, too."""
    device: str
    """What workers compute on: "auto" is decided."""
    first_device: int
    executor: str
    """What computes steps, native or torch: "auto" is decided."""
    executor_reason: str
    """Why it is that one."""
    quantization_label: str
    """A word for how the layers' projections are quantized once they are loaded, or none."""

    @property
    def content(self) -> str:
        """What KV blocks are computed from, for those that outlive this process."""
        return f"{self.weights_digest.hex()}/{self.configuration_digest.hex()}/{self.quantization}"

    def threads_of_worker(self, settings: NodeSettings) -> int:
        """What was asked for, else its share of the CPUs, but no more than its weights are worth."""
        if settings.threads is not None:
            return settings.threads
        cpus = machine.cpus() if settings.cpus is None else settings.cpus
        share = cpus // self.layout.ranks_per_host
        return max(1, min(share, self.weight_bytes // self.layout.ranks // BYTES_PER_THREAD))


def plan_replica(settings: NodeSettings, hosts: int = 1) -> ReplicaPlan:
    """Works the sizes out, for ranks on so many hosts.

    Raises ModelError for a folder that cannot be served, ConfigError for misfit sizes.
    """
    folder = locate_model(settings.model)
    description = describe_model(folder, settings.quantization)
    spec = description.spec
    # Refuses what cannot be cut before anything is started.
    layout = HostLayout(settings.tensor_parallel_size, settings.pipeline_parallel_size, hosts)
    shard_model(spec, layout.place(0))
    device = choose(settings.device, settings.first_device + layout.ranks_per_host)
    checkpoint = open_checkpoint(description.folder)
    match_tensors(spec, checkpoint)
    dtype = compute_dtype(settings.dtype, spec, checkpoint, device)
    executor, executor_reason = choose_executor(
        settings.executor, device, layout.ranks, native_refusal(spec, checkpoint)
    )
    check_kv_dtype(settings.kv_dtype, executor, device)
    block_bytes = _block_bytes(spec, dtype if settings.kv_dtype == "auto" else settings.kv_dtype)
    fingerprint = weights_fingerprint(checkpoint)
    end_token_ids = description.end_token_ids()
    device_bytes = _device_bytes(device, settings, layout)
    max_sequence_tokens, sequence_reason = _longest_sequence(settings, spec, block_bytes, device_bytes)
    total_blocks = _total_blocks(settings, block_bytes, max_sequence_tokens, device_bytes)
    host_blocks = _host_blocks(settings, block_bytes, total_blocks)
    limits = EngineLimits(
        vocabulary=spec.vocabulary,
        total_blocks=total_blocks,
        host_blocks=host_blocks,
        disk_blocks=_disk_blocks(settings, block_bytes, host_blocks, layout.ranks),
        block_tokens=BLOCK_TOKENS,
        max_sequence_tokens=max_sequence_tokens,
        max_sequences=settings.max_sequences,
        max_step_tokens=max(settings.max_step_tokens, settings.max_sequences),
        eos_tokens=list(end_token_ids),
        max_steps_in_flight=_steps_in_flight(settings),
        groups=settings.pipeline_parallel_size,
    )
    return ReplicaPlan(
        folder=folder,
        name=settings.served_name or model_name(settings.model, folder),
        dtype=dtype,
        quantization=settings.quantization,
        kv_dtype=settings.kv_dtype,
        limits=limits,
        sequence_reason=sequence_reason,
        weights_digest=hashlib.sha256(fingerprint.encode()).digest(),
        tokenizer_digest=tokenizer_digest(folder),
        revision=fingerprint.rpartition(":")[2][:16],
        block_bytes=block_bytes,
        weight_bytes=sum(checkpoint.dtype_bytes.values()),
        configuration_digest=_configuration_digest(spec, end_token_ids),
        layout=layout,
        max_step_seconds=settings.max_step_seconds,
        device=device,
        first_device=settings.first_device,
        executor=executor,
        executor_reason=executor_reason,
        quantization_label="none" if spec.quantization is None else spec.quantization.label,
    )


def _steps_in_flight(settings: NodeSettings) -> int:
    """Two steps of one group hide the engine's part of a step; stages need a group each."""
    steps = max(2, settings.pipeline_parallel_size)
    if settings.max_sequences > (most := MAX_ROWS_IN_FLIGHT // steps):
        raise ConfigError(
            f"{setting_name('max_sequences')} is {settings.max_sequences:,}, it must be at most {most:,} where"
            f" {steps} stages have a step in flight each; lower it, or use fewer stages"
        )
    return steps


def choose_executor(wanted: str, device: str, ranks: int, model_refusal: str | None) -> tuple[str, str]:
    """native or torch, and why. Raises ConfigError for what is wanted and cannot be, or needs torch that is not
    installed."""
    refusal = None if device == "cpu" else f"the native executor computes on the CPU, not on {device}"
    if ranks > 1:
        refusal = f"the native executor runs one rank, not {ranks}"
    refusal = refusal or model_refusal
    if wanted == "native" and refusal is not None:
        raise ConfigError(f"executor is 'native', but {refusal}; use torch or auto")
    asked = "as executor (--executor) says"
    if wanted != "torch" and refusal is None:
        return "native", asked if wanted == "native" else "auto is native for one rank on the CPU"
    if (lack := lacking(NODE_PACKAGES, "node")) is not None:
        raise ConfigError(f"{refusal or 'executor is torch'}, and {lack}")
    return "torch", asked if refusal is None or wanted == "torch" else refusal


def check_kv_dtype(kv_dtype: str, executor: str, device: str) -> None:
    """Raises ConfigError where nothing keeps keys and values so."""
    if kv_dtype == "auto" or executor == "native":
        return
    where = "the torch executor keeps" if device == "cpu" else f"workers on {device} keep"
    raise ConfigError(
        f"kv_dtype is {kv_dtype!r}, and {where} keys and values as the activations are; leave it at auto, or serve one"
        " rank on the CPU with --executor native"
    )


def _configuration_digest(spec: ModelSpec, end_token_ids: tuple[int, ...]) -> bytes:
    return hashlib.sha256(msgspec.json.encode((spec, end_token_ids), order="deterministic")).digest()


def _block_bytes(spec: ModelSpec, dtype: str) -> int:
    attentions = [block.attention for block in spec.blocks]
    rows = [2 * each.kv_heads * BLOCK_TOKENS * row_bytes(each.head_dim, dtype) for each in attentions]
    return sum(rows)


def _device_bytes(device: str, settings: NodeSettings, layout: HostLayout) -> int | None:
    """Memory of the replica's devices if they have their own; None for CPUs."""
    if device == "cpu":
        return None
    first = settings.first_device
    devices = cuda_devices()[first : first + layout.ranks_per_host]
    return min(device.memory_bytes for device in devices) * layout.ranks


def _longest_sequence(
    settings: NodeSettings, spec: ModelSpec, block_bytes: int, device_bytes: int | None
) -> tuple[int, str]:
    """Tokens, and why no more. Where nobody says otherwise the machine's share is to hold one: of a model of 8B,
    131,072 tokens take 17 GB, and a laptop was refused after all weights had been read."""
    longest = spec.sequence_limit(settings.max_sequence_tokens)
    if settings.max_sequence_tokens is not None:
        return longest, f"as {setting_name('max_sequence_tokens')} says"
    if settings.kv_cache_bytes is None and device_bytes is None:
        fitting = max(_share_of_blocks(settings, block_bytes) * BLOCK_TOKENS, LEAST_SEQUENCE_TOKENS)
        if fitting < longest:
            why = (
                f"the model's {longest:,} need {longest // BLOCK_TOKENS * block_bytes:,} bytes of KV cache, more than"
                " the share of this machine's memory that is taken unasked; raise --kv-cache-bytes"
            )
            return fitting, why
    return longest, spec.max_sequence_reason


def _share_of_blocks(settings: NodeSettings, block_bytes: int) -> int:
    return machine.memory_bytes() // MAX_MEMORY_SHARE // settings.replicas_here // block_bytes


def _total_blocks(settings: NodeSettings, block_bytes: int, max_sequence_tokens: int, device_bytes: int | None) -> int:
    """Of a device apart the most that it could have: its worker measures how many there is room for."""
    needed = -(-max_sequence_tokens // BLOCK_TOKENS)
    if settings.kv_cache_bytes is not None:
        blocks = settings.kv_cache_bytes // block_bytes
        if blocks < needed:
            raise ConfigError(
                f"kv_cache_bytes is {settings.kv_cache_bytes:,}, which holds {blocks:,} blocks; one sequence of"
                f" {max_sequence_tokens:,} tokens needs {needed:,} ({needed * block_bytes:,} bytes); raise it or lower"
                f" {setting_name('max_sequence_tokens')}"
            )
        if blocks > MAX_POOL_BLOCKS:
            raise ConfigError(
                f"kv_cache_bytes is {settings.kv_cache_bytes:,}, which holds {blocks:,} blocks; the most is"
                f" {MAX_POOL_BLOCKS:,} ({MAX_POOL_BLOCKS * block_bytes:,} bytes): lower it"
            )
        return blocks
    if device_bytes is not None:
        return max(needed, min(MAX_DEVICE_BLOCKS, device_bytes // block_bytes))
    return max(needed, min(DEFAULT_KV_TOKENS // BLOCK_TOKENS, _share_of_blocks(settings, block_bytes)))


def _host_blocks(settings: NodeSettings, block_bytes: int, total_blocks: int) -> int:
    if settings.kv_host_bytes is not None:
        return min(settings.kv_host_bytes // block_bytes, EngineLimits.MAX_HOST_BLOCKS)
    share = machine.memory_bytes() // MAX_HOST_MEMORY_SHARE // settings.replicas_here // block_bytes
    return min(HOST_BLOCKS_PER_BLOCK * total_blocks, share, EngineLimits.MAX_HOST_BLOCKS)


def _disk_blocks(settings: NodeSettings, block_bytes: int, host_blocks: int, ranks: int) -> int:
    """Never of what is free at the moment: another size is another tier, and what the last node left would be lost."""
    if settings.kv_disk is None:
        return 0
    if host_blocks == 0:
        raise ConfigError("kv_disk is set and the host tier has no room for a block; raise kv_host_bytes")
    if settings.kv_disk_bytes is None:
        return min(DISK_BLOCKS_PER_HOST_BLOCK * host_blocks, EngineLimits.MAX_DISK_BLOCKS)
    # Each rank's part of a block begins with a page.
    needed = block_bytes + ranks * DISK_PAGE_BYTES + DISK_RECORD_BYTES
    blocks = (settings.kv_disk_bytes - (ranks + 1) * DISK_PAGE_BYTES) // needed
    if blocks < 1:
        raise ConfigError(f"kv_disk_bytes is {settings.kv_disk_bytes:,}; one block takes {needed:,} bytes; raise it")
    return min(blocks, EngineLimits.MAX_DISK_BLOCKS)
