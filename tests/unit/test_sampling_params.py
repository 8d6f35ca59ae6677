"""Sampling parameters are checked when they are made."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmscale.errors import InvalidField
from llmscale.types import SamplingParams

NUMERIC_FIELDS = (
    "n",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "seed",
    "max_tokens",
    "min_tokens",
    "logprobs",
)
ODD_VALUES = st.one_of(
    st.sampled_from([True, False, "1", math.nan, math.inf, -math.inf, -0.0, 1e308, 2**63, 2**64, -(2**63) - 1, 10**40]),
    st.integers(),
    st.floats(),
)


@given(st.sampled_from(NUMERIC_FIELDS), ODD_VALUES)
def test_any_value_is_either_kept_as_a_finite_number_or_refused_by_name(name: str, value: Any) -> None:
    try:
        kept = getattr(SamplingParams(**{name: value}), name)
    except InvalidField as error:
        complaint = str(error)
        kept = None
    if kept is None:
        assert name in complaint
    else:
        assert not isinstance(kept, bool)
        assert math.isfinite(kept)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"stop": ["a"] * 17}, "stop"),
        ({"stop": [""]}, "stop"),
        ({"stop": "x" * 513}, "stop"),
        ({"stop": "\ud800"}, "stop"),
        ({"stop_token_ids": [-1]}, "stop_token_ids"),
        ({"stop_token_ids": list(range(65))}, "stop_token_ids"),
        ({"logit_bias": {1: math.nan}}, "logit_bias"),
        ({"logit_bias": dict.fromkeys(range(1_025), 1.0)}, "logit_bias"),
        ({"max_tokens": 5, "min_tokens": 6}, "min_tokens"),
        ({"ignore_eos": 1}, "ignore_eos"),
    ],
)
def test_a_list_or_a_pair_out_of_bounds_is_refused(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(InvalidField, match=named):
        SamplingParams(**fields)


def test_one_stop_string_is_a_list_of_one_and_a_mapping_of_biases_is_a_list_of_pairs() -> None:
    params = SamplingParams(stop="\n", logit_bias={7: -1.5})
    assert params.stop == ("\n",)
    assert params.logit_bias == ((7, -1.5),)


def test_a_top_k_of_minus_one_is_all_tokens_as_zero_is() -> None:
    assert SamplingParams(top_k=-1) == SamplingParams(top_k=0)
    for value in (-2, -1.0):
        with pytest.raises(InvalidField, match="top_k"):
            SamplingParams(top_k=value)  # type: ignore[arg-type]
