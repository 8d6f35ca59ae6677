"""Norms, embedding and SiLU on Triton against the reference, at widths around powers of two."""

from __future__ import annotations

import torch
from torch import Tensor

from llmscale.layers.ops import Ops
from llmscale.layers.reference import ReferenceOps
from llmscale.layers.triton.ops import OpsLimits, TritonOps
from llmscale.layers.triton.tiling import DeviceShape
from tests.triton.attention_cases import Shape, attention_constants
from tests.triton.outcome import Case, poisoned, require_close, require_same

ROUNDING = {torch.float32: 4e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def triton_ops(dtype: torch.dtype, device: torch.device) -> Ops:
    constants = attention_constants(Shape(64, 1, 16, ()), device, torch.Generator())
    return TritonOps(constants.spec, dtype, OpsLimits(4, 256), device, DeviceShape(8, 99 * 1024))


def norm_case(rows: int, hidden: int, dtype: torch.dtype) -> Case:
    def run(device: torch.device) -> None:
        generator = torch.Generator().manual_seed(hidden)

        def random(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator).to(dtype).to(device)

        x, residual, weight = random(rows, hidden) * 3, random(rows, hidden), 1 + 0.3 * random(hidden)
        results: list[list[Tensor]] = []
        for ops in (triton_ops(dtype, device), ReferenceOps()):
            plain, after, stream = (poisoned(rows, hidden, dtype=dtype, device=device) for _ in range(3))
            stream.copy_(residual)
            ops.rms_norm(x, weight, 1e-5, plain)
            ops.add_rms_norm(x, stream, weight, 1e-5, after)
            results.append([plain, after, stream])
        (plain, after, stream), (expected_plain, expected_after, expected_stream) = results
        require_close("norm", plain, expected_plain, ROUNDING[dtype])
        require_close("norm after addition", after, expected_after, ROUNDING[dtype])
        if dtype == torch.bfloat16 and device.type == "cpu":
            # The interpreter cuts bits off where a device rounds to nearest.
            require_close("residual stream", stream, expected_stream, ROUNDING[dtype])
        else:
            require_same("residual stream", stream, expected_stream)

    return run


def silu_case(rows: int, inner: int, dtype: torch.dtype) -> Case:
    def run(device: torch.device) -> None:
        generator = torch.Generator().manual_seed(inner)
        gate_up = (torch.randn(rows, 2 * inner, generator=generator) * 4).to(dtype).to(device)
        gate_up[0, 0], gate_up[0, inner - 1] = -100.0, 100.0
        out, expected = (poisoned(rows, inner, dtype=dtype, device=device) for _ in range(2))
        triton_ops(dtype, device).silu_mul(gate_up, out)
        ReferenceOps().silu_mul(gate_up, expected)
        require_close("silu times up", out, expected, ROUNDING[dtype])

    return run


def embed_case(rows: int, vocabulary: int, hidden: int, dtype: torch.dtype) -> Case:
    def run(device: torch.device) -> None:
        generator = torch.Generator().manual_seed(vocabulary)
        table = torch.randn(vocabulary, hidden, generator=generator).to(dtype).to(device)
        token_ids = torch.randint(0, vocabulary, (rows,), generator=generator, dtype=torch.int32).to(device)
        token_ids[0], token_ids[-1] = vocabulary - 1, 0
        out, expected = (poisoned(rows, hidden, dtype=dtype, device=device) for _ in range(2))
        triton_ops(dtype, device).embed(token_ids, table, out)
        ReferenceOps().embed(token_ids, table, expected)
        require_same("embedding", out, expected)

    return run


def unknown_id_case(device: torch.device) -> None:
    table = torch.randn(5, 24, device=device)
    token_ids = torch.tensor([4, 5, -1, 2**31 - 1, 0], dtype=torch.int32, device=device)
    out = torch.zeros(5, 24, device=device)
    triton_ops(torch.float32, device).embed(token_ids, table, out)
    assert bool(out[1:4].isnan().all()), "an id outside the vocabulary must not look like a token"
    require_same("the other rows", out[[0, 4]], table[[4, 0]])


CASES: dict[str, Case] = {
    "norm_of_72": norm_case(5, 72, torch.float32),
    "norm_of_one_element": norm_case(3, 1, torch.float32),
    "norm_of_4096_half": norm_case(3, 4096, torch.float16),
    "norm_of_1025": norm_case(2, 1025, torch.float32),
    "norm_of_577_bfloat16": norm_case(3, 577, torch.bfloat16),
    "silu_of_104": silu_case(4, 104, torch.float32),
    "silu_of_1_in_3_rows": silu_case(3, 1, torch.float32),
    "silu_of_2731_half": silu_case(2, 2731, torch.float16),
    "silu_of_1024_bfloat16": silu_case(2, 1024, torch.bfloat16),
    "embedding_of_60": embed_case(7, 11, 60, torch.float32),
    "embedding_of_1500_half": embed_case(3, 307, 1500, torch.float16),
    "embedding_of_ids_outside": unknown_id_case,
}
