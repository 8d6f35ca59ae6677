"""Goal: quantized weights are multiplied by the operators of CUDA, and what has no kernel is dense and right.

Method: the operators' own CPU implementations against each method's exact reference; whole models on the fake device.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from llmscale import SamplingParams
from llmscale.devices.cuda_products import cuda_product
from llmscale.quant.layouts import Fp8Scales, Layout, compressed_fp8, compressed_int4, compressed_int8
from llmscale.quant.method import method_for
from llmscale.quant.weight import QuantizedWeight
from tests.devices.conftest import MakeFake
from tests.fakes.fake_device.machine import Script

NOTHING = torch.zeros(0, dtype=torch.uint8)
OUTPUTS, INPUTS = 72, 256


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def check(layout: Layout, weight: QuantizedWeight, kind: str) -> None:
    x, bias = random(5, INPUTS, seed=1).bfloat16(), random(OUTPUTS, seed=2).bfloat16()
    # Not the method's reference, which may round activations too.
    reference = x.double() @ method_for(layout).dequantize(weight).double().T + bias.double()
    for given in (bias, None):
        product = cuda_product(layout, weight, given, torch.bfloat16, NOTHING)
        assert product.kind == kind
        assert product.total_bytes > 0
        result = product.apply(x, torch.zeros(5, OUTPUTS, dtype=torch.bfloat16))
        expected = reference if given is not None else reference - bias.double()
        # Rounded to bfloat16 once, once more where a bias is added, and dense weights before.
        torch.testing.assert_close(result.double(), expected, rtol=2**-7, atol=2**-6 * float(expected.abs().mean()))


@pytest.mark.parametrize("group", [32, 64, 128, 256])
@pytest.mark.parametrize("symmetric", [True, False])
def test_four_bits_are_the_kernels(group: int, symmetric: bool) -> None:
    layout = compressed_int4(group, symmetric=symmetric)
    weight = method_for(layout).quantize(random(OUTPUTS, INPUTS))
    check(layout, weight, "cuda")


def test_an_order_of_inputs_is_kept() -> None:
    layout = compressed_int4(32, symmetric=True)
    weight = method_for(layout).quantize(random(OUTPUTS, INPUTS))
    order = torch.randperm(INPUTS, generator=torch.Generator().manual_seed(3))
    check(layout, replace(weight, order=order), "cuda")


def test_e4m3_with_a_scale_per_output_is_the_kernels() -> None:
    layout = compressed_fp8(Fp8Scales.CHANNEL)
    check(layout, method_for(layout).quantize(random(OUTPUTS, INPUTS)), "cuda")


def test_e4m3_with_scales_of_blocks_is_the_kernels_only_where_bfloat16_holds_them() -> None:
    layout = compressed_fp8(Fp8Scales.CHANNEL)
    codes = method_for(layout).quantize(random(OUTPUTS, INPUTS)).codes
    scales = random(OUTPUTS, 2, seed=5).abs() + 0.01
    check(layout, QuantizedWeight(codes, scales.bfloat16().float(), 128), "cuda")
    check(layout, QuantizedWeight(codes, scales + 2**-20, 128), "dense")


def test_eight_bit_integers_are_made_dense() -> None:
    layout = compressed_int8()
    check(layout, method_for(layout).quantize(random(OUTPUTS, INPUTS)), "dense")


@pytest.mark.parametrize("quantization", ["int4", "int8"])
def test_a_quantized_model_runs_with_its_steps_captured(make_fake: MakeFake, script: Script, quantization: str) -> None:
    # The operators make their results; a real graph has a pool for them.
    script.strict = False
    llm = make_fake(model="tiny-chat-mini", quantization=quantization)
    kind = "int4-g32-cuda" if quantization == "int4" else "dense"
    assert kind in llm.numerics, llm.numerics
    asked = SamplingParams(max_tokens=8, temperature=0.0)
    text = llm.generate("What is 2 + 3?", asked)[0].outputs[0].text
    assert text
