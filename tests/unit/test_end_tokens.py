"""The ids that end a sequence: the engine that ends it and the tokenizer that says why have the same ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from llmscale._core import EngineLimits
from llmscale.config import NodeSettings
from llmscale.end_tokens import end_token_ids
from llmscale.errors import InvalidTokenizer
from llmscale.node import plan as node_plan
from llmscale.node.plan import ReplicaPlan, plan_replica
from llmscale.tokenizer import Tokenizer
from tests.fakes.tiny_tokenizer import VOCABULARY, write_byte_level, write_metaspace
from tests.models_support import write_random_checkpoint

END, THINK = 2, 412
"""Of <|im_end|> and <think> in the tokenizer's vocabulary."""


def plan(folder: Path) -> ReplicaPlan:
    return plan_replica(NodeSettings(model=str(folder), listen="tcp://127.0.0.1:0"))


def engine_ends(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The ids that a node gives its engine, which shows them to nobody."""
    given: list[list[int]] = []

    class Limits:
        MAX_HOST_BLOCKS = EngineLimits.MAX_HOST_BLOCKS

        def __new__(cls, **sizes: Any) -> Any:
            given.append(sizes["eos_tokens"])
            return EngineLimits(**sizes)

    monkeypatch.setattr(node_plan, "EngineLimits", Limits)
    plan(folder)
    return given[0]


def folder_with(folder: Path, changes: dict[str, dict[str, object] | None]) -> Path:
    """A model with a tokenizer whose end is <|im_end|>, and some of its files changed or removed (None)."""
    write_random_checkpoint(folder, vocab_size=VOCABULARY, eos_token_id=7)
    write_byte_level(folder)
    for name, change in changes.items():
        if change is None:
            (folder / name).unlink()
        else:
            (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | change))
    return folder


GENERATION, SETTINGS = "generation_config.json", "tokenizer_config.json"


@pytest.mark.parametrize(
    ("changes", "ends"),
    [
        pytest.param({GENERATION: {"eos_token_id": 0}}, [0, END], id="a stale list"),
        pytest.param({GENERATION: {"eos_token_id": [5, 0]}}, [0, END, 5], id="several"),
        pytest.param({GENERATION: {"eos_token_id": None}}, [END, 7], id="config.json's where the other is silent"),
        pytest.param({GENERATION: None}, [END, 7], id="config.json's where there is no other"),
        pytest.param({GENERATION: None, SETTINGS: {"eos_token": {"content": "<|im_end|>"}}}, [END, 7], id="an object"),
        pytest.param({GENERATION: None, SETTINGS: {"eos_token": "<think>"}}, [7, THINK], id="an added token"),
        pytest.param({GENERATION: None, SETTINGS: {"eos_token": "<|unheard|>"}}, [7], id="a text without an id"),
        pytest.param({GENERATION: None, SETTINGS: {"eos_token": None}}, [7], id="a tokenizer that names none"),
        pytest.param({GENERATION: None, SETTINGS: None}, [7], id="no settings"),
    ],
)
def test_an_engine_ends_on_the_ids_that_its_tokenizer_knows(
    changes: dict[str, dict[str, object] | None], ends: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folder_with(tmp_path, changes)
    assert engine_ends(folder, monkeypatch) == ends
    assert Tokenizer(folder).eos_token_ids == tuple(ends)


def test_another_end_is_another_configuration(tmp_path: Path) -> None:
    first = plan(folder_with(tmp_path / "a", {})).configuration_digest
    other = plan(folder_with(tmp_path / "b", {SETTINGS: {"eos_token": "<|im_start|>"}})).configuration_digest
    assert first != other, "streams of the one do not go on at the other"
    assert first == plan(folder_with(tmp_path / "c", {})).configuration_digest


def test_a_model_without_a_tokenizer_ends_on_what_its_configs_list(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folder_with(tmp_path, {"tokenizer.json": None})
    assert engine_ends(folder, monkeypatch) == [0, END]


def test_an_id_that_the_model_does_not_have_ends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = folder_with(tmp_path, {GENERATION: None, SETTINGS: {"eos_token": "<|end|>"}})
    definition = json.loads((folder / "tokenizer.json").read_text())
    definition["added_tokens"].append({"id": VOCABULARY, "content": "<|end|>", "special": True})
    (folder / "tokenizer.json").write_text(json.dumps(definition))
    assert engine_ends(folder, monkeypatch) == [7]


def test_a_malformed_file_is_named(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, {})
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(InvalidTokenizer, match=r"tokenizer\.json is not valid JSON"):
        plan(folder)


@pytest.mark.parametrize("write", [write_byte_level, write_metaspace])
def test_every_token_has_the_id_that_the_library_gives_it(write: Any, tmp_path: Path) -> None:
    definition = json.loads((write(tmp_path) / "tokenizer.json").read_text())
    library = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text, token in library.get_vocab(with_added_tokens=True).items():
        assert end_token_ids([], definition, {"eos_token": text}) == (token,), text


@pytest.mark.parametrize(
    ("definition", "ends"),
    [
        ({"model": {"vocab": [["<unk>", 0.0], ["</s>", 0.0]]}}, (1,)),
        ({"model": {"vocab": [[], None, 7]}, "added_tokens": [None, {"id": 3, "content": "</s>"}]}, (3,)),
        ({"model": None, "added_tokens": {"id": 3}}, ()),
        ({"model": {"vocab": {"</s>": True}}}, ()),
        ({"model": {"vocab": {"</s>": "4"}}}, ()),
        ({"model": {"vocab": {"</s>": -4}}}, ()),
    ],
)
def test_definitions_of_every_shape_are_read(definition: dict[str, Any], ends: tuple[int, ...]) -> None:
    assert end_token_ids([], definition, {"eos_token": "</s>"}) == ends
