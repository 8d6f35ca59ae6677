"""What a worker without torch runs: a model as one native program on the processor, with its KV region and host tier.

A step is one call of the core, whatever is in it. Loading goes layer by layer, so that it can tell how far it is. It
does not know where steps come from or who samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llmscale import env
from llmscale._core import CpuKernels, EngineLimits, NativeProgram, ProgramBuilder, StepCounts
from llmscale.errors import ConfigError
from llmscale.models.checkpoint import Progress, compute_dtype, match_tensors, open_checkpoint
from llmscale.models.native import WeightPlaces, native_refusal
from llmscale.models.registry import describe_model
from llmscale.models.rope import inverse_frequencies
from llmscale.models.spec import ModelSpec
from llmscale.models.tied_tables import refuse_different_tables
from llmscale.worker.host_tier import CopySource
from llmscale.worker.kv_layout import KvLayout, kv_layout_of, require_room
from llmscale.worker.runner import RunnerOptions, make_copies, open_tiers
from llmscale.worker.steps import Memory, Steps, StepSource


@dataclass(frozen=True, slots=True)
class NativeRegion:
    """The KV region of a program, as `BlockMemory`."""

    layout: KvLayout
    blocks: int
    program: NativeProgram

    @property
    def memory(self) -> tuple[int, int]:
        """See `BlockMemory`."""
        return self.program.region


class NativeRunner:
    """See `Runner`; of one rank."""

    exchange = None
    max_steps_ahead = 0

    def __init__(
        self, folder: Path, limits: EngineLimits, options: RunnerOptions, progress: Progress | None = None
    ) -> None:
        """Loads weights, makes the KV region. Raises ModelError, ConfigError, MemoryError."""
        self.place = options.place
        self.limits = limits
        description = describe_model(folder, options.quantization)
        spec = description.spec
        checkpoint = open_checkpoint(description.folder)
        match_tensors(spec, checkpoint)
        refuse_different_tables(spec, checkpoint)
        refusal = native_refusal(spec, checkpoint)
        if refusal is not None or self.place.ranks > 1:
            raise ConfigError(f"{refusal or 'the native executor runs one rank'}; use --executor torch")
        self.dtype = compute_dtype(options.dtype, spec, checkpoint)
        self.kernels = CpuKernels(self.dtype, threads=options.threads, level=env.CPU_LEVEL.read())
        places = WeightPlaces(spec, checkpoint)
        self.program = load_program(spec, places, self.kernels, self.dtype, limits, progress, kv_dtype=options.kv_dtype)
        self.weight_bytes = self.program.weight_bytes
        self.layers = len(spec.blocks)
        weights = "dense" if spec.quantization is None else spec.quantization.label
        kv_dtype = self.dtype if options.kv_dtype == "auto" else options.kv_dtype
        kept = "" if kv_dtype == self.dtype else f"/kv-{kv_dtype}"
        self.numerics = f"native/{weights}/cpu-{self.kernels.level}/{self.dtype}{kept}"
        layout = kv_layout_of(spec, kv_dtype, limits.block_tokens)
        region = NativeRegion(layout, limits.total_blocks, self.program)
        self.host = open_tiers(region, limits, self.numerics, options)

    def steps(self, source: StepSource) -> Steps:
        """See `Runner`."""
        return NativeSteps(self, source)

    def rest(self) -> None:
        """See `Runner`."""

    def copy(self, counts: StepCounts, source: CopySource) -> bool:
        """See `Runner`."""
        return make_copies(self.host, counts, source)


class NativeSteps:
    """See `Steps`; done when a call returns."""

    ahead = 0
    is_done = True

    def __init__(self, runner: NativeRunner, source: StepSource) -> None:
        self._runner = runner
        self._source = source

    def compute(self, counts: StepCounts) -> bool:
        """See `Steps`."""
        self._source.compute(self._runner.kernels, self._runner.program, counts)
        return True

    def draw(self, row_bounds: Sequence[int], rank: int, words: Memory) -> list[int]:
        """See `Steps`."""
        runner = self._runner
        return self._source.draw(runner.kernels, runner.program.logits, runner.dtype, row_bounds, rank, words)

    def forget(self) -> None:
        """See `Steps`."""


def load_program(
    spec: ModelSpec,
    places: WeightPlaces,
    kernels: CpuKernels,
    dtype: str,
    limits: EngineLimits,
    progress: Progress | None = None,
    kv_dtype: str = "auto",
) -> NativeProgram:
    """Reads and packs all weights and makes the KV region. Raises InvalidCheckpoint, ConfigError, MemoryError."""
    attention = spec.blocks[0].attention
    builder = ProgramBuilder(
        dtype,
        (spec.hidden_size, spec.vocabulary, len(spec.blocks), attention.kv_heads, attention.head_dim),
        (
            limits.max_step_tokens,
            limits.max_sequences,
            limits.max_sequence_tokens,
            limits.total_blocks,
            limits.block_tokens,
        ),
        kv_dtype,
    )
    done_bytes = 0
    for block in spec.blocks:
        here, attention = places.block(block), block.attention
        builder.block(
            kernels,
            attention_norm=here.attention_norm,
            query_heads=attention.query_heads,
            head_norms=here.head_norms,
            window_tokens=attention.window_tokens,
            frequencies=inverse_frequencies(attention.rope, attention.head_dim),
            qkv=here.qkv,
            output=here.output,
            mlp_norm=here.mlp_norm,
            gate_up=here.gate_up,
            down=here.down,
        )
        done_bytes += here.total_bytes
        if progress is not None:
            progress(done_bytes, places.total_bytes)
    program = builder.finish(kernels, places.norm(spec.norm), places.head(), places.embedding())
    # Head and table, gigabytes of a large vocabulary, are there only now. The region is too, but not yet its pages: the
    # thread that makes the first ones has just begun.
    layout = kv_layout_of(spec, dtype if kv_dtype == "auto" else kv_dtype, limits.block_tokens)
    require_room(limits.total_blocks * layout.block_bytes)
    if progress is not None:
        progress(places.total_bytes, places.total_bytes)
    return program
