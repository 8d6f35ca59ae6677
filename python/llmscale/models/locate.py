"""From what a user calls a model to the folder that holds it: an embedded name, a folder, a GGUF file that is imported
when it is first asked for, or a hub id that the local Hugging Face cache has. Nothing is downloaded. O(1) but for one
directory listing of the cache, and an import.
"""

from __future__ import annotations

import re
from pathlib import Path

from llmscale import env
from llmscale.embedded import EMBEDDED_MODELS, embedded_model_path
from llmscale.errors import InvalidCheckpoint

_HUB_ID = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}")


def locate_model(model: str) -> Path:
    """The folder of `model`. Raises InvalidCheckpoint if there is none."""
    if model in EMBEDDED_MODELS:
        return embedded_model_path(model)
    folder = _expanded(model)
    if folder.is_dir():
        return folder.resolve()
    if is_gguf(model):
        # What reads and converts such files is not loaded for others.
        from llmscale.models.gguf_cache import imported_folder

        return imported_folder(folder.resolve())
    if _HUB_ID.fullmatch(model) and (snapshot := _cached_snapshot(model)) is not None:
        return snapshot
    known = ", ".join(EMBEDDED_MODELS) or "none in this installation"
    raise InvalidCheckpoint(
        f"{model!r} is neither a folder nor an embedded model ({known}), and the local Hugging Face cache does not hold"
        " it; give the folder or the GGUF file of a downloaded model"
    )


def is_gguf(model: str) -> bool:
    """Whether a model is a file whose name says that it is GGUF. Raises InvalidCheckpoint for a home that is none."""
    path = _expanded(model)
    return path.suffix.lower() == ".gguf" and path.is_file()


def model_name(model: str, folder: Path) -> str:
    """The name under which clients ask for a model: what the user said, or a path's own name without what is before."""
    if is_gguf(model):
        return Path(model).stem
    if model in EMBEDDED_MODELS or (_HUB_ID.fullmatch(model) and not Path(model).is_dir()):
        return model
    return folder.name


def _expanded(path: str) -> Path:
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise InvalidCheckpoint(
            f"the home folder of {path!r} cannot be found: {error} Write the whole path, or set HOME"
        ) from error


def _cached_snapshot(hub_id: str) -> Path | None:
    home = _expanded(env.HF_HOME.read() or "~/.cache/huggingface")
    repository = home / "hub" / ("models--" + hub_id.replace("/", "--"))
    reference = repository / "refs" / "main"
    if not reference.is_file():
        return None
    snapshot = repository / "snapshots" / reference.read_text().strip()
    return snapshot if snapshot.is_dir() else None
