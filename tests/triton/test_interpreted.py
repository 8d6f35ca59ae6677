"""Every Triton kernel under Triton's interpreter, in float32 and float16, against the reference and the CPU sampler.

No device is needed. The interpreter holds bfloat16 as integers, so of bfloat16 only the branch that widens is covered.
The cases run in one process of their own, since importing torch and Triton takes longer than most of them; planted bugs
in another one. A test is the outcome of one case.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton comes with torch's CUDA wheels for Linux")

from tests.triton.plants import PLANTS
from tests.triton.run_cases import FAMILIES

pytestmark = pytest.mark.timeout(900)

ROOT = Path(__file__).parents[2]
CASES = [name for family in FAMILIES for name in importlib.import_module(f"tests.triton.{family}").CASES]
THOROUGH = {
    "attention_decode_96_group_4_block_64",
    "attention_decode_64_group_8_block_32_half",
    "attention_decode_in_parts_half",
    "attention_chunks_window_over_tiles_half",
    "attention_chunks_80_group_3_block_64",
    "attention_decode_in_parts",
    "attention_mixture_64_group_4_block_32",
    "attention_mixture_128_group_3_half",
    "sampling_plain",
    "sampling_more_filters",
    "sampling_filters_sparse",
    "sampling_filters_equal_logits",
}
"""Combinations whose parts other cases have too."""
THOROUGH_PLANTS = {
    "sums_are_not_faded_with_the_maximum",
    "tiles_of_chunks_forget_that_sequences_begin_tiles",
    "values_are_stored_over_keys",
    "ties_at_the_cut_are_all_kept",
    "the_share_of_top_p_is_taken_twice",
    "frequency_counts_once",
}
"""Bugs in kernels that others are planted in too, or that take seconds to find."""


def outcomes_of(*arguments: str) -> dict[str, Any]:
    command = [sys.executable, "-W", "ignore", "-m", "tests.triton.run_cases", *arguments]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=800, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.fixture(scope="module")
def outcomes() -> dict[str, Any]:
    return outcomes_of(*(case for case in CASES if case not in THOROUGH))


@pytest.fixture(scope="module")
def thorough_outcomes() -> dict[str, Any]:
    return outcomes_of(*sorted(THOROUGH))


@pytest.fixture(scope="module")
def planted_outcomes() -> dict[str, Any]:
    return outcomes_of("--planted", *(bug for bug in PLANTS if bug not in THOROUGH_PLANTS))


@pytest.fixture(scope="module")
def thorough_planted_outcomes() -> dict[str, Any]:
    return outcomes_of("--planted", *sorted(THOROUGH_PLANTS))


@pytest.mark.parametrize("case", [case for case in CASES if case not in THOROUGH])
def test_kernels_agree_with_their_oracle(case: str, outcomes: dict[str, Any]) -> None:
    assert outcomes[case]["failure"] is None


@pytest.mark.slow
@pytest.mark.parametrize("case", sorted(THOROUGH))
def test_kernels_agree_with_their_oracle_in_more_combinations(case: str, thorough_outcomes: dict[str, Any]) -> None:
    assert thorough_outcomes[case]["failure"] is None


@pytest.mark.parametrize("bug", [bug for bug in PLANTS if bug not in THOROUGH_PLANTS])
def test_a_planted_bug_is_found(bug: str, planted_outcomes: dict[str, Any]) -> None:
    require_found(bug, planted_outcomes)


@pytest.mark.slow
@pytest.mark.parametrize("bug", sorted(THOROUGH_PLANTS))
def test_more_planted_bugs_are_found(bug: str, thorough_planted_outcomes: dict[str, Any]) -> None:
    require_found(bug, thorough_planted_outcomes)


def require_found(bug: str, planted_outcomes: dict[str, Any]) -> None:
    """It must show as a wrong result, not as a kernel that cannot run."""
    found = planted_outcomes[bug]
    assert found, f"no case begins with {PLANTS[bug].cases}"
    failures = [outcome["failure"] for outcome in found.values() if outcome["failure"] is not None]
    assert failures, f"{', '.join(found)} did not notice"
    assert any(failure.startswith("AssertionError") for failure in failures), failures
