"""Tiny random models on disk, and a planner that drives an executor the way an engine would, at random.

Checkpoints are written by transformers, whose own model then serves as the oracle. Every parameter is randomized, norms
and biases too, since weights of one or zero hide a part that is left out.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from llmscale.evaluation import executors
from llmscale.models.registry import describe_model
from llmscale.models.spec import ModelSpec
from llmscale.worker.kv_layout import BlockMemory, kv_layout_of
from llmscale.worker.native_runner import NativeRegion
from llmscale.worker.step import Executor, StepInputs, StepLimits

VOCABULARY = 307


def _llama(**changes: Any) -> Any:
    from transformers import LlamaConfig

    values = {
        "hidden_size": 72,
        "intermediate_size": 104,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "head_dim": 24,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        "rms_norm_eps": 1e-5,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return LlamaConfig(**(values | changes))


def _mistral(**changes: Any) -> Any:
    from transformers import MistralConfig

    values = {
        "hidden_size": 72,
        "intermediate_size": 104,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 512,
        "sliding_window": None,
    }
    return MistralConfig(**(values | changes))


def _qwen2(**changes: Any) -> Any:
    from transformers import Qwen2Config

    values = {
        "hidden_size": 64,
        "intermediate_size": 88,
        "num_hidden_layers": 3,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        "eos_token_id": 2,
    }
    return Qwen2Config(**(values | changes))


def _qwen3(**changes: Any) -> Any:
    from transformers import Qwen3Config

    values = {
        "hidden_size": 60,
        "intermediate_size": 104,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "head_dim": 40,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "eos_token_id": 2,
    }
    return Qwen3Config(**(values | changes))


# Odd shapes throughout: nothing is a power of two that need not be.
TINY_CONFIGS: dict[str, Callable[[], Any]] = {
    "llama_grouped": _llama,
    "llama2_without_grouping": lambda: _llama(num_attention_heads=4, num_key_value_heads=4, head_dim=8, hidden_size=32),
    "llama_of_whole_groups": lambda: _llama(
        hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2, head_dim=16
    ),
    "llama_with_biases": lambda: _llama(attention_bias=True, mlp_bias=True),
    "llama3_scaled_rope_tied": lambda: _llama(
        tie_word_embeddings=True,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 5000.0,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ),
    "llama_linear_rope": lambda: _llama(rope_parameters={"rope_type": "linear", "rope_theta": 10_000.0, "factor": 2.5}),
    "llama_dynamic_rope": lambda: _llama(
        rope_parameters={"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0}
    ),
    "mistral": _mistral,
    "mistral_with_window": lambda: _mistral(sliding_window=37),
    "qwen2": _qwen2,
    "qwen2_tied": lambda: _qwen2(tie_word_embeddings=True, rope_parameters={"rope_theta": 1e6, "rope_type": "default"}),
    "qwen2_with_windowed_layers": lambda: _qwen2(use_sliding_window=True, sliding_window=50, max_window_layers=1),
    "qwen3": _qwen3,
    "qwen3_with_biases": lambda: _qwen3(attention_bias=True, tie_word_embeddings=False),
}


def write_tiny_model(name: str, folder: Path, seed: int = 0) -> Any:
    """Writes a random checkpoint of the case into `folder`; returns transformers' model of it (float32, eager)."""
    import transformers

    config = TINY_CONFIGS[name]()
    config._attn_implementation = "eager"
    model = getattr(transformers, type(config).__name__.replace("Config", "ForCausalLM"))(config).float().eval()
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in parameter_name:
                parameter.copy_(1 + 0.2 * noise)
            elif parameter_name.endswith("bias"):
                parameter.copy_(0.3 * noise)
            else:
                # Twice the usual spread, so that attention is peaked and logits differ by position.
                parameter.copy_(noise * 2.0 / parameter.shape[-1] ** 0.5)
    model.save_pretrained(folder)
    return model


# A config as transformers 4 writes it; tests change single fields.
LLAMA_CONFIG: Mapping[str, object] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "vocab_size": 53,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "eos_token_id": 2,
    "torch_dtype": "float32",
}


def write_config(folder: Path, **changes: object) -> None:
    """Writes config.json: `LLAMA_CONFIG` with the changes."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**LLAMA_CONFIG, **changes}))


def random_tensors(spec: ModelSpec, dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, Tensor]:
    """A random tensor for every checkpoint name of the spec."""
    generator = torch.Generator().manual_seed(seed)
    return {
        part.name: torch.randn(part.shape, generator=generator).to(dtype)
        for weight in spec.weights()
        for part in weight.parts
    }


def write_random_checkpoint(folder: Path, dtype: torch.dtype = torch.float32, **changes: object) -> dict[str, Tensor]:
    """Writes config.json and model.safetensors without transformers; returns the tensors."""
    write_config(folder, **changes)
    tensors = random_tensors(describe_model(folder).spec, dtype)
    save_file(tensors, folder / "model.safetensors")
    return tensors


class NativeExecutor(executors.NativeExecutor):
    """The native program of a model folder as the `Executor` of a planner that knows its region."""

    def __init__(
        self,
        folder: Path,
        dtype: str,
        limits: StepLimits,
        blocks: int,
        *,
        quantization: str | None = None,
        kv_dtype: str = "auto",
        threads: int = 2,
    ) -> None:
        model = describe_model(folder)
        choice = executors.ModelChoice(folder, dtype, quantization, threads, kv_dtype=kv_dtype)
        super().__init__(choice, model, limits, blocks)
        layout = kv_layout_of(model.spec, dtype if kv_dtype == "auto" else kv_dtype)
        self.region = NativeRegion(layout, blocks, self.runner.program)

    def use_region(self, kv_region: object) -> None:
        """A program has one of its own."""
        raise AssertionError("a program computes on its own region")


@dataclass(slots=True)
class DrivenSequence:
    """A sequence in the random planner: its tokens so far, where its blocks are, and the logits of every position."""

    tokens: list[int]
    slot: int
    computed: int = 0
    blocks: list[int] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)


class RandomPlanner:
    """Runs sequences through an executor in random batches and chunks, with blocks scattered over the region.

    Every row samples, in random order, so that logits of all positions can be compared. It plans one step at a time and
    never keeps a sequence's blocks in order.
    """

    def __init__(self, executor: Executor, region: BlockMemory, limits: StepLimits, seed: int) -> None:
        self.executor = executor
        self._limits = limits
        self._block_tokens = region.layout.block_tokens
        self._random = random.Random(seed)
        self._free_blocks = list(range(region.blocks))
        self._random.shuffle(self._free_blocks)
        self._max_blocks = -(-limits.max_sequence_tokens // self._block_tokens)
        self._free_slots = list(range(limits.max_sequences))
        self._random.shuffle(self._free_slots)
        # Entries that no sequence owns are poisoned: reading one would index far outside the region.
        self._tables = torch.full((limits.max_sequences * self._max_blocks,), 2**30, dtype=torch.int32)

    def admit(self, tokens: Sequence[int]) -> DrivenSequence:
        return DrivenSequence(list(tokens), self._free_slots.pop())

    def leave(self, sequence: DrivenSequence) -> None:
        """Gives the sequence's blocks back in random order, with its bytes still in them."""
        self._free_blocks.extend(sequence.blocks)
        self._random.shuffle(self._free_blocks)
        self._free_slots.append(sequence.slot)

    def run_until_computed(self, sequences: Sequence[DrivenSequence]) -> None:
        """Steps until every token of every sequence is computed."""
        while pending := [sequence for sequence in sequences if sequence.computed < len(sequence.tokens)]:
            self.step(pending)

    def decode_greedily(self, sequences: Sequence[DrivenSequence], tokens: int) -> None:
        """Computes the prompts, then appends `tokens` greedy tokens to each sequence, in batches of random make-up."""
        goals = {id(sequence): len(sequence.tokens) + tokens for sequence in sequences}
        while True:
            for sequence in sequences:
                if sequence.computed == len(sequence.tokens) < goals[id(sequence)]:
                    sequence.tokens.append(int(sequence.logits[-1].argmax()))
            pending = [sequence for sequence in sequences if sequence.computed < len(sequence.tokens)]
            if not pending:
                return
            self.step(pending)

    def step(self, pending: Sequence[DrivenSequence]) -> None:
        """One step over a random choice of the pending sequences, each with a random chunk."""
        chosen = self._random.sample(pending, self._random.randint(1, len(pending)))
        budget = self._limits.max_step_tokens
        chunks: list[tuple[DrivenSequence, int]] = []
        for sequence in chosen:
            left = len(sequence.tokens) - sequence.computed
            chunk = min(left, self._random.choice((1, 2, 5, 31, 32, 33, 64)), budget)
            if chunk > 0:
                chunks.append((sequence, chunk))
                budget -= chunk
        chunks.sort(key=lambda item: item[1] > 1)
        inputs = self._expand(chunks)
        result = self.executor.forward(inputs)
        assert result.shape[0] == inputs.samples
        assert result.is_contiguous()
        logits = torch.empty(result.shape)
        logits[inputs.sample_rows.long()] = result.float()
        row = 0
        for sequence, chunk in chunks:
            sequence.logits.extend(logits[row : row + chunk])
            sequence.computed += chunk
            row += chunk

    def _expand(self, chunks: list[tuple[DrivenSequence, int]]) -> StepInputs:
        tokens: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        starts = [0]
        for sequence, chunk in chunks:
            span = range(sequence.computed, sequence.computed + chunk)
            while len(sequence.blocks) * self._block_tokens < span.stop:
                self._tables[sequence.slot * self._max_blocks + len(sequence.blocks)] = self._free_blocks[-1]
                sequence.blocks.append(self._free_blocks.pop())
            tokens.extend(sequence.tokens[span.start : span.stop])
            positions.extend(span)
            slots.extend(
                sequence.blocks[position // self._block_tokens] * self._block_tokens + position % self._block_tokens
                for position in span
            )
            starts.append(starts[-1] + chunk)
        return StepInputs(
            rows=len(tokens),
            sequences=len(chunks),
            samples=len(tokens),
            token_ids=_int32(tokens),
            positions=_int32(positions),
            slot_mapping=_int32(slots),
            query_start=_int32(starts),
            sequence_lengths=_int32([sequence.computed + chunk for sequence, chunk in chunks]),
            table_offsets=_int32([sequence.slot * self._max_blocks for sequence, _ in chunks]),
            block_tables=self._tables,
            sample_rows=_int32(self._random.sample(range(len(tokens)), len(tokens))),
        )


def _int32(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)
