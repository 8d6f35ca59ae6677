"""Error feedback and scale search: codes are those of the paper's recursion, and lose less than rounding."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor

from llmscale.errors import ConfigError
from llmscale.models.quantizer import layout_for
from llmscale.quant import error_feedback
from llmscale.quant.channel_scales import powers_of_two, searched_scales
from llmscale.quant.error_feedback import DAMPING, FeedbackOptions, fed_back, searched_grid
from llmscale.quant.grid import CodeGrid
from llmscale.quant.method import GriddedMethod, gridded_method_for

PLAIN = FeedbackOptions(uses_order=False, searches_range=False)


def method(name: str, group: int | None = None, *, symmetric: bool = False) -> GriddedMethod:
    found = gridded_method_for(layout_for(name, group, symmetric=symmetric))
    assert found is not None
    return found


def correlated(inputs: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight [24, inputs], and moments of activations whose inputs depend on each other and differ in size."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(24, inputs, generator=generator)
    mixed = torch.randn(512, inputs // 4, generator=generator) @ torch.randn(inputs // 4, inputs, generator=generator)
    rows = (mixed + 0.3 * torch.randn(512, inputs, generator=generator)) * torch.linspace(0.1, 3, inputs)
    return weight, (rows.double().t() @ rows.double())


def loss(weight: Tensor, values: Tensor, moments: Tensor) -> float:
    error = (values - weight).double()
    return float(((error @ moments) * error).sum())


def elimination(weight: Tensor, moments: Tensor, grid: CodeGrid, order: list[int]) -> Tensor:
    """Optimal brain quantization, straight from the paper: the inverse of what is left is computed anew every time."""
    left = weight.double().clone()
    damped = moments + DAMPING * moments.diagonal().mean() * torch.eye(moments.shape[0], dtype=torch.float64)
    codes = torch.empty_like(weight)
    for place, column in enumerate(order):
        rest = order[place:]
        inverse = torch.linalg.inv(damped[rest][:, rest])
        group = column // grid.group_size
        codes[:, column] = grid.column_codes(left[:, column].float(), group)
        error = left[:, column] - grid.column_values(codes[:, column], group)
        left[:, rest] -= (error / inverse[0, 0])[:, None] * inverse[0][None, :]
    return codes


@pytest.mark.parametrize("uses_order", [False, True])
@pytest.mark.parametrize(("name", "group"), [("int4", 32), ("int8", None)])
def test_codes_are_those_of_the_papers_elimination(
    name: str, group: int | None, uses_order: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(error_feedback, "COLUMNS_TOGETHER", 20)
    weight, moments = correlated(96)
    quantizer = method(name, group)
    made = fed_back(weight, moments, quantizer, FeedbackOptions(uses_order=uses_order, searches_range=False))
    grid = quantizer.grid(weight)
    order = moments.diagonal().float().argsort(descending=True, stable=True).tolist() if uses_order else list(range(96))
    expected = grid.values(elimination(weight, moments, grid, order))
    # float32 and float64 may fall on two sides of a half; the codes after it differ too, by a step or two.
    differing = (quantizer.dequantize(made) != expected).float().mean()
    assert differing < 0.02
    found, paper = (loss(weight, values, moments) for values in (quantizer.dequantize(made), expected))
    assert found == pytest.approx(paper, rel=0.02)


@pytest.mark.parametrize("group", [32, 64])
@pytest.mark.parametrize("symmetric", [False, True])
def test_feedback_loses_less_than_half_of_what_rounding_loses(group: int, symmetric: bool) -> None:
    weight, moments = correlated(128)
    quantizer = method("int4", group, symmetric=symmetric)
    rounded = loss(weight, quantizer.dequantize(quantizer.quantize(weight)), moments)
    for options in (PLAIN, FeedbackOptions()):
        assert loss(weight, quantizer.dequantize(fed_back(weight, moments, quantizer, options)), moments) < rounded / 2


def test_inputs_that_do_not_depend_on_each_other_are_rounded_to_the_nearest() -> None:
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(1))
    quantizer = method("int4", 32)
    made = fed_back(weight, torch.diag(torch.linspace(1, 2, 64)), quantizer, PLAIN)
    assert torch.equal(quantizer.dequantize(made), quantizer.dequantize(quantizer.quantize(weight)))


def test_inputs_that_no_text_used_are_rounded_to_the_nearest() -> None:
    weight, moments = correlated(64)
    moments[:, 5] = moments[5] = 0
    quantizer = method("int4", 32)
    made = quantizer.dequantize(fed_back(weight, moments, quantizer, PLAIN))
    assert torch.equal(made[:, 5], quantizer.dequantize(quantizer.quantize(weight))[:, 5])
    nothing = fed_back(weight, torch.zeros(64, 64), quantizer, PLAIN)
    assert torch.equal(quantizer.dequantize(nothing), quantizer.dequantize(quantizer.quantize(weight)))


def test_a_grid_is_narrower_where_outliers_carry_no_energy() -> None:
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(2))
    weight[:, 3] = 40.0
    energy = torch.ones(64)
    energy[3] = 1e-6
    quantizer = method("int4", 32)
    grid, plain = searched_grid(weight, energy, quantizer), quantizer.grid(weight)
    assert (grid.scales[:, 0] < 0.6 * plain.scales[:, 0]).all(), "half of the range is the least"
    errors = [((one.values(one.codes(weight)) - weight).square() * energy).sum() for one in (grid, plain)]
    assert errors[0] < errors[1]


def test_what_has_no_answer_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, moments = correlated(64)
    quantizer = method("int4", 32)
    with pytest.raises(ConfigError, match="not finite"):
        fed_back(weight, moments * float("inf"), quantizer)
    with pytest.raises(ConfigError, match="which groups of 128 do not divide"):
        fed_back(weight, moments, method("int4", 128))
    monkeypatch.setattr(error_feedback, "MAX_INPUTS", 63)
    with pytest.raises(ConfigError, match=r"has 64 input features, the limit of error feedback is 63 \(MAX_INPUTS\)"):
        fed_back(weight, moments, quantizer)
    assert gridded_method_for(layout_for("fp8")) is None


def test_a_loud_input_gets_a_scale_and_the_product_loses_less() -> None:
    generator = torch.Generator().manual_seed(3)
    weight, rows = torch.randn(32, 64, generator=generator), torch.randn(256, 64, generator=generator)
    rows[:, 7] *= 50
    quantizer = method("int4", 64)
    same = [lambda scales: scales] * 2
    scales = searched_scales(weight, rows, rows.abs().mean(dim=0), quantizer, *same)
    assert scales is not None
    assert scales.argmax() == 7
    exact = rows @ weight.t()
    scaled = quantizer.reference(rows / scales, quantizer.quantize(weight * scales))
    plain = quantizer.reference(rows, quantizer.quantize(weight))
    assert (scaled - exact).square().mean() < 0.5 * (plain - exact).square().mean()


def test_activations_of_nothing_have_no_scales() -> None:
    same = [lambda scales: scales] * 2
    assert searched_scales(torch.ones(4, 32), torch.zeros(8, 32), torch.zeros(32), method("int4", 32), *same) is None


def test_powers_of_two_divide_exactly() -> None:
    scales = powers_of_two(torch.tensor([0.3, 1.0, 5.0, 6.0]))
    assert scales.tolist() == [0.25, 1.0, 4.0, 8.0]


MEASURED = """
from pathlib import Path
import torch
from llmscale.models.quantizer import layout_for
from llmscale.quant.error_feedback import fed_back
from llmscale.quant.method import gridded_method_for

def status(name):
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) << 10

def feed(inputs):
    rows = torch.randn(64, inputs)
    moments = torch.mm(rows.t(), rows).double()
    # The peak counts from now on.
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    fed_back(torch.randn(32, inputs), moments, gridded_method_for(layout_for("int4", 32)))
    return status("VmHWM") - before

torch.set_num_threads(1)
feed(256)
inputs = 2_048
print(feed(inputs) / (inputs * inputs * 8))
"""


def test_feedback_needs_two_matrices_beside_the_moments() -> None:
    done = subprocess.run([sys.executable, "-c", MEASURED], capture_output=True, text=True, check=True)
    assert 1.5 < float(done.stdout) < 2.6, "in matrices; at 32,768 inputs each takes 8.6 GB"
