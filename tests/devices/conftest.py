"""A worker on the fake device in this process, and the CPU worker's answers to compare with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import Any

import pytest

from llmscale import LLM
from llmscale.devices import registry
from tests.fakes.fake_device.machine import SCRIPT, Script

MODEL = "tiny-chat"
SIZES: dict[str, Any] = {
    "dtype": "float32",
    "threads": 1,
    "max_num_seqs": 12,
    "max_num_batched_tokens": 96,
    "executor": "torch",
}
MakeFake = Callable[..., LLM]


@pytest.fixture
def script() -> Iterator[Script]:
    """What the fake device does; as it was afterwards."""
    _reset()
    yield SCRIPT
    _reset()


@pytest.fixture
def make_fake(script: Script, monkeypatch: pytest.MonkeyPatch) -> MakeFake:
    """Makes an `LLM` that takes the fake device for the CPU."""

    def make(**options: Any) -> LLM:
        with monkeypatch.context() as patch:
            patch.setitem(registry.DEVICES, "cpu", "tests.fakes.fake_device.device")
            llm = LLM(options.pop("model", MODEL), **{**SIZES, "device": "cpu", **options})
        assert "/fake-" in llm.numerics, llm.numerics
        script.runs = 0
        return llm

    return make


@pytest.fixture(scope="session")
def cpu() -> LLM:
    return LLM(MODEL, **SIZES, device="cpu")


def _reset() -> None:
    fresh = Script()
    for field in fields(Script):
        setattr(SCRIPT, field.name, getattr(fresh, field.name))
