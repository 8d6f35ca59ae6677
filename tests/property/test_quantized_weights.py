"""Properties of quantization itself, over shapes and values that hypothesis draws: zero rows, outliers, odd widths.

What is rounded to the nearest is off by at most half of its scale; what is stored is loaded again; and every product
computes what its method's reference says.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmscale.errors import ConfigError
from llmscale.quant.fp8 import MAX_CODE
from llmscale.quant.int4 import raised_to_bfloat16
from llmscale.quant.int8 import Int8, PortableInt8
from llmscale.quant.layouts import (
    Cut,
    Fp8Scales,
    Int8Layout,
    Layout,
    compressed_fp8,
    compressed_int4,
    compressed_int8,
    whole_cut,
)
from llmscale.quant.method import method_for
from llmscale.quant.weight import expanded, packed_nibbles, trimmed_groups, unpacked_nibbles

LAYOUTS: dict[str, Layout] = {
    "int8": compressed_int8(),
    "int4 in groups of 32": compressed_int4(32, symmetric=True),
    "int4 with zero points": compressed_int4(64, symmetric=False),
    "int4 per channel": compressed_int4(None, symmetric=False),
    "fp8": compressed_fp8(Fp8Scales.CHANNEL),
}
INTEGER_LAYOUTS = [name for name in LAYOUTS if name != "fp8"]
FAST = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
MAX_BFLOAT16_ERROR = 0.01
"""Of the largest result: inputs, weights, zero points and the result are each rounded to 8 bits."""

pytestmark = pytest.mark.usefixtures("one_thread")


@st.composite
def weights(draw: st.DrawFn, unit: int = 64) -> Tensor:
    """[N, K] with a row of zeros and an outlier, scaled over thirty orders of magnitude; K a multiple of `unit`."""
    outputs, inputs = draw(st.integers(1, 70)), unit * draw(st.integers(1, 4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1 << 30)))
    weight = torch.randn(outputs, inputs, generator=generator)
    weight[draw(st.integers(0, outputs - 1))] = 0
    weight[-1, draw(st.integers(0, inputs - 1))] = draw(st.sampled_from([0.0, 1e3, -1e5]))
    return weight * 10.0 ** draw(st.integers(-20, 10))


@pytest.mark.parametrize("name", INTEGER_LAYOUTS)
@given(weight=weights())
@FAST
def test_no_weight_is_off_by_more_than_half_of_its_scale(name: str, weight: Tensor) -> None:
    method = method_for(LAYOUTS[name])
    quantized = method.quantize(weight)
    error = (method.dequantize(quantized).double() - weight.double()).abs()
    scales = expanded(quantized.scales, quantized.group_size, weight.shape[1]).double()
    # float32 rounds the quotient and the product once each.
    assert bool((error <= scales * (0.5 + 1e-4)).all())
    assert bool((method.dequantize(quantized)[weight.abs().amax(dim=1) == 0] == 0).all())


@given(weight=weights(unit=1))
@FAST
def test_fp8_keeps_three_bits_of_every_weight(weight: Tensor) -> None:
    method = method_for(LAYOUTS["fp8"])
    quantized = method.quantize(weight)
    error = (method.dequantize(quantized).double() - weight.double()).abs()
    # Half of the last of three bits, or half of the least subnormal, 2^-9.
    allowed = torch.maximum(weight.double().abs() / 16, quantized.scales.double() * 2.0**-10)
    assert bool((error <= allowed * (1 + 1e-4)).all())
    assert float(quantized.codes.float().abs().max()) <= MAX_CODE


@pytest.mark.parametrize("name", LAYOUTS)
@given(weight=weights())
@FAST
def test_what_is_stored_is_loaded_again(name: str, weight: Tensor) -> None:
    method = method_for(LAYOUTS[name])
    quantized = method.quantize(weight)
    shape = (weight.shape[0], weight.shape[1])
    stored = method.stored(quantized)
    for spec in method.weight_specs(shape):
        if spec.is_required:
            assert tuple(stored[spec.suffix].shape) == spec.shape(shape), spec.suffix
    loaded = method.load(stored, whole_cut(shape))
    assert torch.equal(method.dequantize(loaded), method.dequantize(quantized))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", LAYOUTS)
@given(weight=weights(), rows=st.sampled_from([1, 2, 3, 7, 16, 33]), biased=st.booleans())
@FAST
def test_a_product_computes_what_its_reference_says(
    name: str, dtype: torch.dtype, weight: Tensor, rows: int, biased: bool
) -> None:
    method = method_for(LAYOUTS[name])
    quantized = method.quantize(weight)
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, weight.shape[1], generator=generator).to(dtype)
    x[rows // 2] = 0
    bias = torch.randn(weight.shape[0], generator=generator).to(dtype) if biased else None
    expected = method.reference(x, quantized, bias)
    product = method.prepare(quantized, bias, dtype)
    result = product.apply(x, torch.zeros(rows, weight.shape[0], dtype=dtype))
    assert result.dtype == dtype
    if isinstance(method, Int8):
        assert torch.equal(result, expected), "sums of bytes are exact"
        return
    bound = 1e-5 if name == "fp8" and dtype == torch.float32 else MAX_BFLOAT16_ERROR
    # A sum of products that cancel each other is no measure of the error of each; nor is a weight of zero, which int4
    # makes of a code and a zero point.
    parts = method.dequantize(quantized).double().abs()
    if name.startswith("int4"):
        parts += 8 * expanded(quantized.scales, quantized.group_size, weight.shape[1])
    magnitude = (x.double().abs() @ parts.t()).amax() + (0 if bias is None else bias.double().abs().amax())
    assert float((result.double() - expected.double()).abs().amax()) <= bound * float(magnitude) + 1e-30


@given(weight=weights(unit=1), rows=st.integers(1, 9))
@FAST
def test_cpus_without_vnni_compute_the_same_bytes(weight: Tensor, rows: int) -> None:
    method = Int8(Int8Layout("compressed-tensors"))
    quantized = method.quantize(weight)
    x = torch.randn(rows, weight.shape[1])
    out = torch.empty(rows, weight.shape[0])
    portable = PortableInt8(method, quantized, None).apply(x, out)
    assert torch.equal(portable, method.reference(x, quantized))


def test_the_largest_bytes_do_not_saturate() -> None:
    """Without VNNI x86 adds two products in 16 bits; 4,096 products of 127 and 127 show whether it happens."""
    method = method_for(compressed_int8())
    quantized = method.quantize(torch.ones(16, 4_096))
    result = method.prepare(quantized, None, torch.float32).apply(torch.ones(3, 4_096), torch.empty(3, 16))
    assert torch.allclose(result, torch.full((3, 16), 4_096.0), rtol=1e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", LAYOUTS)
def test_what_is_not_a_number_stays_so_and_harms_no_other_row(name: str, value: float) -> None:
    method = method_for(LAYOUTS[name])
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(1))
    product = method.prepare(method.quantize(weight), None, torch.float32)
    x = torch.ones(3, 64)
    alone = product.apply(x, torch.empty(3, 32)).clone()
    x[1, 5] = value
    result = product.apply(x, torch.empty(3, 32))
    assert not bool(result[1].isfinite().any())
    assert torch.equal(result[[0, 2]], alone[[0, 2]])


@pytest.mark.parametrize(("group", "inputs"), [(32, 48), (64, 96), (128, 64)])
def test_groups_that_do_not_divide_the_width_are_refused(group: int, inputs: int) -> None:
    method = method_for(compressed_int4(group, symmetric=True))
    with pytest.raises(ConfigError, match=rf"{inputs} input features, which groups of {group} do not divide"):
        method.quantize(torch.ones(4, inputs))
    assert method.quantize(torch.ones(4, 4 * group)).scales.shape == (4, 4)


@given(st.integers(1, 9), st.integers(1, 40), st.integers(0, 1 << 20))
@FAST
def test_nibbles_are_unpacked_as_they_were_packed(rows: int, pairs: int, seed: int) -> None:
    codes = torch.randint(16, (rows, 2 * pairs), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    packed = packed_nibbles(codes)
    assert packed.shape == (rows, pairs)
    assert torch.equal(unpacked_nibbles(packed), codes)


@given(st.data())
@FAST
def test_every_input_of_a_cut_keeps_its_scale(data: st.DataObject) -> None:
    group, groups = data.draw(st.sampled_from([1, 32, 96, 128])), data.draw(st.integers(1, 5))
    inputs = group * groups - data.draw(st.integers(0, group - 1))
    start = data.draw(st.integers(0, inputs - 1))
    stop = data.draw(st.integers(start + 1, inputs))
    touched = torch.arange(start // group, -(-stop // group)).float()[None]
    scales, size = trimmed_groups(touched, (start, stop), group)
    expected = (torch.arange(start, stop) // group).float()[None]
    assert torch.equal(expanded(scales, size, stop - start), expected)


@given(st.floats(0, 2.0**100, width=32))
@FAST
def test_scales_are_raised_to_the_next_bfloat16(value: float) -> None:
    raised = raised_to_bfloat16(torch.tensor([value]))
    assert float(raised) >= value
    assert float(raised) == float(raised.bfloat16())
    assert float(raised) <= value * (1 + 2.0**-7) + 1e-38


def test_a_cut_knows_what_it_leaves_out() -> None:
    assert not whole_cut((4, 64)).divides_inputs
    assert Cut((0, 4), (32, 64), (4, 64)).divides_inputs
