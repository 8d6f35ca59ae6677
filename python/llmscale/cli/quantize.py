"""`llmscale quantize`: a quantized copy of a model folder, as compressed-tensors."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from llmscale import env


def run(model: str, target: Path, method: str, group_size: int | None, *, symmetric: bool) -> None:
    """Writes the folder and prints what became of its size. Raises ModelError and ConfigError."""
    env.prepare_for_torch()
    from llmscale.models.locate import locate_model
    from llmscale.models.quantizer import layout_for, quantize_folder

    layout = layout_for(method, group_size, symmetric=symmetric)
    console = Console()
    with console.status(f"quantizing {model} to {layout.label}"):
        written = quantize_folder(locate_model(model), target, layout)
    console.print(
        f"{target}: {layout.label}, {written.weights:,} projections,"
        f" {written.after_bytes / 1e6:,.1f} MB instead of {written.before_bytes / 1e6:,.1f} MB"
    )
