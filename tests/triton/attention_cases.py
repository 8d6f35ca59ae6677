"""Attention and rotation on Triton against the reference: sizes of heads, groups and blocks, windows, mixtures."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llmscale.layers.ops import AttentionConstants, HeadNorms, KvLayer
from llmscale.layers.reference import ReferenceOps
from llmscale.layers.rotary import rope_table
from llmscale.layers.triton.ops import OpsLimits, TritonOps
from llmscale.layers.triton.tiling import DeviceShape
from llmscale.models.spec import AttentionSpec, LinearSpec, RopeSpec, TensorSpec, WeightSpec
from tests.triton.outcome import Case, Rows, poisoned, require_close, require_same, step_rows

TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""float16: probabilities and results have 11 bits each, values reach 4."""
MAX_TOKENS = 2048
LAYERS = 3


@dataclass(frozen=True, slots=True)
class Shape:
    """One model's attention and one step: sequences are (length, rows)."""

    head_dim: int
    group: int
    block_tokens: int
    spans: tuple[tuple[int, int], ...]
    kv_heads: int = 2
    window: int | None = None
    dtype: torch.dtype = torch.float32
    processors: int = 8
    norms: bool = False
    padding_rows: int = 0


DECODES = ((1, 1), (33, 1), (70, 1))
LONG_DECODES = ((1100, 1), (600, 1), (3, 1))
CHUNKS = ((7, 7), (40, 21), (75, 2))
LONG_CHUNKS = ((9, 9), (129, 40))
MIXTURE = ((50, 1), (17, 1), (37, 14), (9, 9))
HALF = torch.float16

SHAPES = {
    "decode_64_group_1_block_16": Shape(64, 1, 16, DECODES),
    "decode_80_group_3_block_32": Shape(80, 3, 32, DECODES, kv_heads=1),
    "decode_96_group_4_block_64": Shape(96, 4, 64, DECODES, kv_heads=1),
    "decode_128_group_7_block_16": Shape(128, 7, 16, DECODES, kv_heads=1),
    "decode_64_group_8_block_32_half": Shape(64, 8, 32, DECODES, dtype=HALF),
    "decode_24_group_3_block_32": Shape(24, 3, 32, DECODES, norms=True),
    "decode_128_group_17_block_32": Shape(128, 17, 32, DECODES, kv_heads=1, dtype=HALF),
    "decode_in_parts": Shape(64, 4, 32, LONG_DECODES, kv_heads=1, processors=8),
    "decode_in_parts_window": Shape(64, 2, 16, LONG_DECODES, kv_heads=1, window=300, processors=16),
    "decode_in_parts_half": Shape(128, 4, 64, LONG_DECODES[:2], dtype=HALF, processors=16),
    "decode_window_of_one_token": Shape(64, 2, 32, DECODES, window=1, kv_heads=1),
    "decode_window_across_blocks": Shape(80, 4, 16, DECODES, window=37, kv_heads=1),
    "decode_graph_with_absent_sequences": Shape(
        64, 4, 32, (*DECODES, (0, 0), (0, 0)), kv_heads=1, padding_rows=2, processors=32
    ),
    "chunks_64_group_1_block_16": Shape(64, 1, 16, CHUNKS, kv_heads=1),
    "chunks_80_group_3_block_64": Shape(80, 3, 64, CHUNKS, kv_heads=1, norms=True, dtype=HALF),
    "chunks_96_group_7_block_64": Shape(96, 7, 64, ((7, 7), (36, 6)), kv_heads=1),
    "chunks_128_group_4_block_32_half": Shape(128, 4, 32, LONG_CHUNKS, dtype=HALF, kv_heads=1),
    "chunks_64_group_8_block_16": Shape(64, 8, 16, CHUNKS, dtype=HALF),
    "chunks_window_within_a_tile": Shape(64, 2, 32, CHUNKS, window=5, kv_heads=1),
    "chunks_window_over_tiles_half": Shape(64, 2, 16, ((200, 65), (3, 3)), window=100, kv_heads=1, dtype=HALF),
    "mixture_64_group_4_block_32": Shape(64, 4, 32, MIXTURE, kv_heads=1),
    "mixture_80_group_7_window": Shape(80, 7, 16, MIXTURE, window=20, kv_heads=1, norms=True, dtype=HALF),
    "mixture_128_group_3_half": Shape(128, 3, 32, MIXTURE, dtype=HALF, kv_heads=1, norms=True),
    "mixture_bfloat16": Shape(64, 4, 32, MIXTURE, dtype=torch.bfloat16, kv_heads=1, norms=True),
}


def attention_constants(shape: Shape, device: torch.device, generator: torch.Generator) -> AttentionConstants:
    """The spec with random norms; its weights are not read."""
    weight = LinearSpec(WeightSpec("unused", (TensorSpec("unused", (1, 1)),)))
    rope = RopeSpec(10_000.0)
    heads = shape.group * shape.kv_heads
    spec = AttentionSpec(heads, shape.kv_heads, shape.head_dim, rope, weight, weight, window_tokens=shape.window)
    norms = None
    if shape.norms:
        query, key = (1 + 0.3 * torch.randn(2, shape.head_dim, generator=generator)).to(shape.dtype).to(device)
        norms = HeadNorms(query.contiguous(), key.contiguous(), 1e-5)
    return AttentionConstants(spec, norms, rope_table(rope, shape.head_dim, MAX_TOKENS, device))


def attention_case(shape: Shape, seed: int) -> Case:
    def run(device: torch.device) -> None:
        generator = torch.Generator().manual_seed(seed)

        def random(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator).to(shape.dtype).to(device)

        constants = attention_constants(shape, device, generator)
        spec = constants.spec
        blocks = 4 + sum(-(-length // shape.block_tokens) for length, _ in shape.spans)
        region = random(blocks, LAYERS, 2, shape.kv_heads, shape.block_tokens, shape.head_dim)
        rows = step_rows(shape.spans, shape.block_tokens, blocks, device, generator, shape.padding_rows)
        total = sum(count for _, count in shape.spans)
        qkv = random(total + shape.padding_rows, (spec.query_heads + 2 * spec.kv_heads) * spec.head_dim)
        limits = OpsLimits(max_sequences=len(shape.spans), max_sequence_tokens=MAX_TOKENS)
        ops = TritonOps(spec, shape.dtype, limits, device, DeviceShape(shape.processors, 99 * 1024))
        present = present_rows(rows, total)
        oracle = ReferenceOps()

        expected_region, expected_query = (
            region.clone(),
            poisoned(total, spec.query_size, dtype=shape.dtype, device=device),
        )
        oracle.begin_step(present)
        oracle.rotate_and_store(qkv[:total], constants, KvLayer(expected_region, 1), expected_query)
        query = poisoned(total + shape.padding_rows, spec.query_size, dtype=shape.dtype, device=device)
        ops.begin_step(rows)
        ops.rotate_and_store(qkv, constants, KvLayer(region, 1), query)
        # One rounding of a rotated element, which a fused multiplication and addition may move.
        rounding = {torch.float32: 4e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}[shape.dtype]
        require_close("rotated queries", query[:total], expected_query, rounding)
        require_close("keys and values", region, expected_region, rounding)
        require_same("other layers", region[:, [0, 2]], expected_region[:, [0, 2]])

        expected = poisoned(total, spec.query_size, dtype=torch.float32, device=device)
        oracle.attend(query[:total].float(), constants, KvLayer(region, 1), expected)
        poison_free_slots(region, rows, shape)
        out = poisoned(total + shape.padding_rows, spec.query_size, dtype=shape.dtype, device=device)
        ops.attend(query, constants, KvLayer(region, 1), out)
        require_close("attention", out[:total], expected, TOLERANCE[shape.dtype])
        if shape.padding_rows:
            assert bool(out[total:].isnan().all()), "rows of the padding were written"

    return run


def present_rows(rows: Rows, total: int) -> Rows:
    """The same without padding: the reference knows of none."""
    counts = rows.query_start.diff()
    there = counts > 0
    starts = torch.cat((rows.query_start[:1], rows.query_start[1:][there]))
    return Rows(
        rows.positions[:total],
        rows.slot_mapping[:total],
        starts,
        rows.sequence_lengths[there],
        rows.table_offsets[there],
        rows.block_tables,
    )


def poison_free_slots(region: Tensor, rows: Rows, shape: Shape) -> None:
    """NaN in every slot that belongs to no sequence, and in the other layers: reading one spoils the result."""
    keep = torch.zeros(region.shape[0] * shape.block_tokens, dtype=torch.bool, device=region.device)
    for sequence, (length, _) in enumerate(shape.spans):
        at = torch.arange(length, device=region.device)
        table = rows.block_tables[int(rows.table_offsets[sequence]) :]
        keep[table[at // shape.block_tokens].long() * shape.block_tokens + at % shape.block_tokens] = True
    free = ~keep.view(region.shape[0], 1, 1, 1, shape.block_tokens, 1)
    region.masked_fill_(free, float("nan"))
    region[:, [0, 2]] = float("nan")


CASES: dict[str, Case] = {
    f"attention_{name}": attention_case(shape, seed) for seed, (name, shape) in enumerate(SHAPES.items())
}
