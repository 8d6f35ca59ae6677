"""Paged attention on a device: right against float64, decodes as a share of the copy rate, chunks of prompts in
operations per second.

Decodes read every key and value once, so their figure is bytes of KV per second. torch's attention on dense tensors of
the same lengths stands beside, without pages and without a batch of mixed lengths. Blocks are scattered over the
region, layers rotate through more memory than a cache holds.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from bench.gpu_timing import DEVICE, ROTATING_BYTES, Budget, graph_microseconds, inverted, peer_microseconds
from bench.result import Row
from bench.statistics import Spread
from llmscale.layers.ops import AttentionConstants, KvLayer, Ops
from llmscale.layers.rotary import rope_table
from llmscale.models.spec import AttentionSpec, LinearSpec, RopeSpec, WeightSpec

BLOCK_TOKENS = 32
MAX_RELATIVE_ERROR = 4e-3
"""Of a norm: a bfloat16 result is wrong by 2^-9.2 on average."""


@dataclass(frozen=True, slots=True)
class Heads:
    """Of one model's attention."""

    query: int
    kv: int
    dim: int

    @property
    def token_bytes(self) -> int:
        """Keys and values of a token in bfloat16, one layer."""
        return 2 * self.kv * self.dim * 2

    def __str__(self) -> str:
        return f"{self.query}q{self.kv}kv{self.dim}"


# Llama 8B, 70B, and a model with few heads of 64.
MODELS = (Heads(32, 8, 128), Heads(64, 8, 128), Heads(14, 2, 64))
DECODES = ((1, 2_048), (1, 8_192), (1, 32_768), (16, 2_048), (64, 2_048), (64, 8_192), (256, 2_048))
"""Sequences and the length of each."""
CHUNKS = ((2_048, 2_048), (2_048, 8_192), (512, 8_192), (8_192, 8_192))
"""Rows of a prompt and the length with them."""


@dataclass(frozen=True, slots=True)
class Step:
    """`StepRows` of equal sequences."""

    positions: Tensor
    slot_mapping: Tensor
    query_start: Tensor
    sequence_lengths: Tensor
    table_offsets: Tensor
    block_tables: Tensor


def step(spans: Sequence[tuple[int, int]]) -> Step:
    """Of sequences of (length, rows), in scattered blocks."""
    longest = max(blocks_of(length) for length, _ in spans)
    tables = torch.randperm(len(spans) * longest, dtype=torch.int32).view(len(spans), longest)
    positions = [torch.arange(length - rows, length) for length, rows in spans]
    slots = [
        tables[sequence, at // BLOCK_TOKENS].long() * BLOCK_TOKENS + at % BLOCK_TOKENS
        for sequence, at in enumerate(positions)
    ]
    starts = [0]
    for _, rows in spans:
        starts.append(starts[-1] + rows)

    def there(values: Tensor) -> Tensor:
        return values.int().to(DEVICE)

    return Step(
        there(torch.cat(positions)),
        there(torch.cat(slots)),
        there(torch.tensor(starts)),
        there(torch.tensor([length for length, _ in spans])),
        there(torch.arange(len(spans)) * longest),
        there(tables.flatten()),
    )


def blocks_of(tokens: int) -> int:
    """That hold so many tokens."""
    return -(-tokens // BLOCK_TOKENS)


def constants(heads: Heads, max_tokens: int) -> AttentionConstants:
    """Attention as Llama has it."""
    nothing = LinearSpec(WeightSpec("none", ()))
    spec = AttentionSpec(heads.query, heads.kv, heads.dim, rope=RopeSpec(500_000.0), qkv=nothing, output=nothing)
    return AttentionConstants(spec, None, rope_table(spec.rope, heads.dim, max_tokens, DEVICE))


def make_ops(attention: AttentionConstants, max_sequences: int, max_tokens: int) -> Ops:
    """The device's."""
    from llmscale.layers.triton.ops import OpsLimits, TritonOps

    return TritonOps(attention.spec, torch.bfloat16, OpsLimits(max_sequences, max_tokens), DEVICE)


def random_region(heads: Heads, blocks: int, layers: int) -> Tensor:
    """Keys and values as they come out of norms."""
    shape = (blocks, layers, 2, heads.kv, BLOCK_TOKENS, heads.dim)
    return torch.randn(shape, dtype=torch.bfloat16, device=DEVICE)


def gathered(region: Tensor, rows: Step, sequence: int) -> Tensor:
    """Keys and values of a sequence in layer 0: [2, K, length, D]."""
    length = int(rows.sequence_lengths[sequence])
    first = int(rows.table_offsets[sequence])
    blocks = region[rows.block_tables[first : first + blocks_of(length)].long(), 0]
    return blocks.permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, :length]


def correctness(budget: Budget) -> Iterator[Row]:
    """Relative errors of norms. Raises AssertionError where one is more than rounding."""
    for heads in MODELS:
        for name, spans in (
            ("decode", ((1, 1), (33, 1), (777, 1), (2_000, 1))),
            ("mixed", ((1_500, 1), (700, 700), (1_000, 130))),
        ):
            if not budget.allows():
                continue
            rows = step(spans)
            region = random_region(heads, int(rows.block_tables.numel()), 1)
            attention = constants(heads, 2_048)
            query = torch.randn(rows.positions.numel(), heads.query * heads.dim, device=DEVICE).bfloat16()
            out = torch.full_like(query, float("nan"))
            ops = make_ops(attention, len(spans), 2_048)
            ops.begin_step(rows)
            ops.attend(query, attention, KvLayer(region, 0), out)
            expected = torch.cat([exact(query, region, rows, at, heads) for at in range(len(spans))])
            error = float((out.double() - expected).norm() / expected.norm())
            case = f"correct/attention/{heads}/{name}"
            assert error <= MAX_RELATIVE_ERROR, f"{case}: the relative error is {error:.3g}"
            yield Row(case, error, "relative error", error, error, 1)


def exact(query: Tensor, region: Tensor, rows: Step, sequence: int, heads: Heads) -> Tensor:
    """[rows, Q D] of one sequence in float64."""
    first, end = (int(at) for at in rows.query_start[sequence : sequence + 2])
    keys, values = gathered(region, rows, sequence).double().repeat_interleave(heads.query // heads.kv, dim=1)
    queries = query[first:end].double().view(end - first, heads.query, heads.dim).transpose(0, 1)
    scores = queries @ keys.transpose(1, 2) * heads.dim**-0.5
    seen = torch.arange(keys.shape[1], device=DEVICE) <= rows.positions[first:end, None]
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    return (weights @ values).transpose(0, 1).flatten(1)


def decode_rates(budget: Budget, limits: dict[str, float]) -> Iterator[Row]:
    """Of every model, batch and length."""
    for heads in MODELS:
        for sequences, length in DECODES:
            if not budget.allows():
                continue
            kv_bytes = sequences * length * heads.token_bytes
            own, peer = attend_microseconds(heads, [(length, 1)] * sequences)
            rate = inverted(own, kv_bytes / 1e3)
            peers: dict[str, float | str] = {"own us": own.median, "torch dense us": peer}
            yield Row.of(
                f"decode/{heads}/{sequences}x{length}",
                "GB/s",
                rate,
                limit=limits.get("copy_gigabytes_per_second"),
                peers=peers,
            )


def chunk_rates(budget: Budget, limits: dict[str, float]) -> Iterator[Row]:
    """Of every model and chunk: one prompt alone."""
    for heads in MODELS:
        for rows, length in CHUNKS:
            if not budget.allows():
                continue
            own, peer = attend_microseconds(heads, [(length, rows)])
            pairs = rows * (length - rows) + rows * (rows + 1) // 2
            rate = inverted(own, 4 * heads.query * heads.dim * pairs / 1e6)
            peers: dict[str, float | str] = {"own us": own.median, "torch dense us": peer}
            case = f"chunk/{heads}/{rows}of{length}"
            yield Row.of(case, "TFLOP/s", rate, limit=limits.get("bf16_teraflops"), peers=peers)


def attend_microseconds(heads: Heads, spans: Sequence[tuple[int, int]]) -> tuple[Spread, float | str]:
    """Ours, and torch's on dense tensors of sequences that are all as long as the first."""
    length, rows_each = spans[0]
    rows = step(spans)
    blocks = int(rows.block_tables.numel())
    layers = max(2, min(32, ROTATING_BYTES // (blocks * BLOCK_TOKENS * heads.token_bytes)))
    region = random_region(heads, blocks, layers)
    attention = constants(heads, length)
    ops = make_ops(attention, len(spans), length)
    ops.begin_step(rows)
    query = torch.randn(rows.positions.numel(), heads.query * heads.dim, device=DEVICE).bfloat16()
    out = torch.empty_like(query)
    kv_layers = [KvLayer(region, at) for at in range(layers)]
    own = graph_microseconds([lambda kv=kv: ops.attend(query, attention, kv, out) for kv in kv_layers])
    dense = torch.randn(layers, 2, len(spans), heads.kv, length, heads.dim, dtype=torch.bfloat16, device=DEVICE)
    queries = query.view(len(spans), rows_each, heads.query, heads.dim).transpose(1, 2)
    bias = None if rows_each == 1 else causal_lower_right(rows_each, length)
    calls = [
        lambda kv=kv: scaled_dot_product_attention(queries, kv[0], kv[1], attn_mask=bias, enable_gqa=True)
        for kv in dense
    ]
    return own, peer_microseconds(calls)
