"""A tied checkpoint that stores two tables: whoever takes one of them refuses it where they differ, by any dtype."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from llmscale.calibration.folder import quantize_calibrated
from llmscale.errors import InvalidCheckpoint
from llmscale.evaluation.executors import ModelChoice
from llmscale.evaluation.scorer import Scorer
from llmscale.models import tied_tables
from llmscale.models.checkpoint import open_checkpoint
from llmscale.models.loader import load_weights
from llmscale.models.quantizer import layout_for, quantize_folder
from llmscale.models.registry import describe_model
from llmscale.models.tied_tables import refuse_different_tables
from tests.models_support import write_random_checkpoint

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


@pytest.fixture(autouse=True)
def _always_one_thread(one_thread: None) -> None:
    """See `one_thread`."""


def load(folder: Path) -> None:
    model = describe_model(folder)
    load_weights(model.folder, model.spec)


def score_natively(folder: Path) -> None:
    Scorer(ModelChoice(folder, threads=1, executor="native"))


def quantize(folder: Path) -> None:
    quantize_folder(folder, folder / "made", layout_for("int8"))


def calibrate(folder: Path) -> None:
    quantize_calibrated(folder, folder / "made", layout_for("int8"), [[1, 2, 3]])


def tied(folder: Path, embedding: Tensor | None = None, head: Tensor | None = None) -> Path:
    """A tied model with two tables, by default the same one."""
    tensors = write_random_checkpoint(folder, tie_word_embeddings=True)
    table = tensors[EMBEDDING] if embedding is None else embedding
    head = table if head is None else head
    save_file(tensors | {EMBEDDING: table, HEAD: head.clone()}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("take", [load, score_natively, quantize, calibrate])
def test_two_different_tables_in_a_tied_checkpoint_are_refused(take: Callable[[Path], None], tmp_path: Path) -> None:
    take(tied(tmp_path / "same"))
    table = torch.full((53, 24), 0.25)
    with pytest.raises(InvalidCheckpoint, match=r"differ\. Set tie_word_embeddings to false"):
        take(tied(tmp_path / "different", table, table + 1e-3))


def differ(folder: Path) -> bool:
    model = describe_model(folder)
    try:
        refuse_different_tables(model.spec, open_checkpoint(model.folder))
    except InvalidCheckpoint:
        return True
    return False


@pytest.mark.parametrize("chunk", [7, 24, 53 * 24, 1 << 20])
def test_every_number_of_the_tables_is_compared(chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tied_tables, "CHUNK_ELEMENTS", chunk)
    table = torch.arange(53 * 24, dtype=torch.bfloat16).view(53, 24)
    assert not differ(tied(tmp_path / "same", table))
    for row, column in ((0, 0), (30, 5), (52, 23)):
        head = table.clone()
        head[row, column] += 16
        assert differ(tied(tmp_path / f"{row}", table, head))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_tables_of_two_dtypes_are_compared_by_their_numbers(dtype: torch.dtype, tmp_path: Path) -> None:
    # Numbers that all three dtypes hold.
    table = (torch.arange(53 * 24).view(53, 24) % 200 - 100) / 64
    for other in (torch.bfloat16, torch.float16, torch.float32):
        assert not differ(tied(tmp_path / "same", table.to(dtype), table.to(other)))
        assert differ(tied(tmp_path / "different", table.to(dtype), (table + 1).to(other)))


def test_zeros_of_either_sign_are_the_same_number(tmp_path: Path) -> None:
    assert not differ(tied(tmp_path / "zeros", torch.zeros(53, 24), -torch.zeros(53, 24)))


def test_a_table_that_is_cut_off_while_it_is_read_is_refused(tmp_path: Path) -> None:
    folder = tied(tmp_path / "cut")
    model = describe_model(folder)
    checkpoint = open_checkpoint(model.folder)
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(checkpoint.tensors[HEAD].end - 1)
    with pytest.raises(InvalidCheckpoint, match="was cut off while it was read"):
        refuse_different_tables(model.spec, checkpoint)
