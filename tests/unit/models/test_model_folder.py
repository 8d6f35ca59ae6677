"""A model folder is read within its own walls."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from llmscale.errors import InvalidCheckpoint
from llmscale.models.folder import ModelFolder
from llmscale.models.loader import load_weights
from llmscale.models.registry import describe_model
from tests.models_support import write_random_checkpoint


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/b", "..", "", ".", "a\\b", "a\0b"])
def test_names_that_are_not_plain_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(InvalidCheckpoint, match="is not a plain name"):
        ModelFolder(tmp_path).file(name)


def test_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "outside.json").write_text("{}")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").symlink_to(tmp_path / "outside.json")
    with pytest.raises(InvalidCheckpoint, match="leaves model folder"):
        ModelFolder(folder).file("config.json")


def test_a_snapshot_of_the_hugging_face_cache_loads_through_its_links(tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path / "plain")
    repository = tmp_path / "models--someone--something"
    blobs, snapshot = repository / "blobs", repository / "snapshots" / "0123abcd"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted((tmp_path / "plain").iterdir())):
        path.rename(blobs / f"blob{number}")
        (snapshot / path.name).symlink_to(Path("../../blobs") / f"blob{number}")
    model = describe_model(snapshot)
    assert load_weights(model.folder, model.spec).total_bytes == model.spec.parameters * 4
    (tmp_path / "link").symlink_to(snapshot)
    assert describe_model(tmp_path / "link").spec == model.spec


def test_a_snapshot_may_link_nowhere_but_to_its_blobs(tmp_path: Path) -> None:
    snapshot = tmp_path / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    (tmp_path / "refs").write_text("{}")
    (snapshot / "config.json").symlink_to(Path("../../refs"))
    with pytest.raises(InvalidCheckpoint, match="leaves model folder"):
        ModelFolder(snapshot).file("config.json")


def test_a_pipe_is_refused_instead_of_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(InvalidCheckpoint, match="not a regular file"):
        describe_model(tmp_path)


def test_a_loop_of_links_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").symlink_to("config.json")
    with pytest.raises(InvalidCheckpoint, match="is missing"):
        describe_model(tmp_path)


def test_a_folder_that_is_not_there_or_no_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidCheckpoint, match="cannot be opened"):
        describe_model(tmp_path / "nothing")
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidCheckpoint, match="give the folder that holds"):
        describe_model(tmp_path / "file")
    with pytest.raises(InvalidCheckpoint, match=r"'config.json' is missing"):
        describe_model(tmp_path)
