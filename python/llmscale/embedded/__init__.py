"""The models that ship inside the package, by name: the door to their folders and nothing else.

`tiny-chat` and `tiny-chat-mini` are trained by this project (`examples/tiny_chat/`). A name resolves in O(1) to a
folder that any loader of Hugging Face folders reads. This module knows no tensor library and reads no weights.
"""

from pathlib import Path

__all__ = ["EMBEDDED_MODELS", "UnknownEmbeddedModel", "embedded_model_path"]

_ROOT = Path(__file__).resolve().parent

EMBEDDED_MODELS: tuple[str, ...] = tuple(
    name for name in ("tiny-chat", "tiny-chat-mini") if (_ROOT / name / "config.json").is_file()
)
"""Names of the embedded models that this installation carries, largest first."""


class UnknownEmbeddedModel(LookupError):
    """The name is not that of an embedded model."""


def embedded_model_path(name: str) -> Path:
    """Folder of the embedded model `name`: config.json, model.safetensors, tokenizer.json and the rest.

    Raises UnknownEmbeddedModel when there is no such model.
    """
    if name not in EMBEDDED_MODELS:
        known = ", ".join(EMBEDDED_MODELS) or "none in this installation"
        raise UnknownEmbeddedModel(
            f"{name!r} is no embedded model. Embedded models: {known}. For any other, give its folder."
        )
    return _ROOT / name
