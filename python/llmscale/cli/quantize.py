"""`llmscale quantize`: a quantized copy of a model folder, as compressed-tensors."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as ProgressBars

from llmscale import env
from llmscale.errors import ConfigError
from llmscale.extras import NODE_PACKAGES, lacking

if TYPE_CHECKING:
    from llmscale.calibration.folder import Calibrated
    from llmscale.quant.layouts import Layout


DEFAULT_SAMPLES = 1_024
DEFAULT_TOKENS = 65_536
KEEP = "keep"
"""As a GGUF file has its weights."""


@dataclass(frozen=True, slots=True)
class QuantizeOptions:
    """What the command was told."""

    model: str
    target: Path
    method: str
    group_size: int | None
    symmetric: bool
    tokenizer: Path | None
    calibrate: str | None
    calibration_samples: int | None
    calibration_tokens: int | None
    seed: int | None


def run(options: QuantizeOptions) -> None:
    """Writes the folder and prints what became of its size. Raises ModelError and ConfigError; a signal that ends the
    command leaves nothing of it."""
    from llmscale.models.end_signals import unwound_by_signals

    with unwound_by_signals():
        _run(options)


def _run(options: QuantizeOptions) -> None:
    from llmscale.models.locate import is_gguf, locate_model

    extras = ("node", "gguf") if is_gguf(options.model) else ("node",)
    if (lack := lacking(NODE_PACKAGES, *extras)) is not None:
        raise ConfigError(f"llmscale quantize needs more than the base install: {lack}")
    env.prepare_for_torch()
    from llmscale.models.quantizer import layout_for, quantize_folder

    if options.calibrate is None:
        given = {"samples": options.calibration_samples, "tokens": options.calibration_tokens, "seed": options.seed}
        if any(value is not None for value in given.values()):
            raise ConfigError(
                "--calibration-samples, --calibration-tokens and --seed say which texts are read; give them with"
                " --calibrate FILE"
            )
    if is_gguf(options.model):
        _run_gguf(options)
        return
    if options.tokenizer is not None:
        raise ConfigError("--tokenizer is for GGUF files; a folder has its own")
    if options.method == KEEP:
        raise ConfigError(f"method {KEEP} is for GGUF files; give int8, int4 or fp8")
    layout = layout_for(options.method, options.group_size, symmetric=options.symmetric)
    console = Console()
    folder = locate_model(options.model)
    if options.calibrate is None:
        with console.status(f"quantizing {options.model} to {layout.label}"):
            written = quantize_folder(folder, options.target, layout)
        how = "rounded to the nearest"
    else:
        calibrated = _calibrated(options, folder, layout)
        written = calibrated.written
        how = f"calibrated on {calibrated.sequences:,} texts, {calibrated.tokens:,} tokens"
    console.print(
        f"{options.target}: {layout.label}, {written.weights:,} projections, {how},"
        f" {written.after_bytes / 1e6:,.1f} MB instead of {written.before_bytes / 1e6:,.1f} MB"
    )


def _run_gguf(options: QuantizeOptions) -> None:
    """Imports a file as it is, or as a dense folder that is quantized then."""
    from llmscale.models.gguf_import import import_gguf
    from llmscale.models.new_folder import require_new
    from llmscale.models.quantizer import layout_for

    source = Path(options.model).expanduser()
    if options.method == KEEP:
        given = [options.group_size is not None, options.symmetric, options.calibrate is not None]
        if any(given):
            raise ConfigError(f"method {KEEP} takes no group size, symmetry or calibration; name another method")
        done = import_gguf(source, options.target, tokenizer=options.tokenizer)
        Console().print(f"{options.target}: {done}, {done.after_bytes / 1e6:,.1f} MB")
        return
    # What would be refused after the import, which takes minutes.
    require_new(options.target)
    layout_for(options.method, options.group_size, symmetric=options.symmetric)
    # Where the target will be, so that there is room for one if there is room for the other.
    options.target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{options.target.name}.", dir=options.target.parent) as room:
        folder = Path(room) / source.stem
        # Integers of the file would be rounded to integers: their numbers are what is quantized.
        imported = import_gguf(source, folder, tokenizer=options.tokenizer, keeps_integers=False)
        Console().print(f"{source.name}: {imported}")
        _run(replace(options, model=str(folder), tokenizer=None))


def _calibrated(options: QuantizeOptions, folder: Path, layout: Layout) -> Calibrated:
    from llmscale.calibration.block import CalibrationOptions
    from llmscale.calibration.folder import quantize_calibrated
    from llmscale.calibration.texts import TextLimits, calibration_texts
    from llmscale.models.quantizer import dense_model
    from llmscale.tokenizer import Tokenizer

    assert options.calibrate is not None
    spec = dense_model(folder).spec
    tokenizer = Tokenizer(folder, vocabulary=spec.vocabulary)
    limits = TextLimits(
        max_sequences=DEFAULT_SAMPLES if options.calibration_samples is None else options.calibration_samples,
        max_sequence_tokens=min(TextLimits().max_sequence_tokens, spec.max_sequence_tokens),
        max_tokens=DEFAULT_TOKENS if options.calibration_tokens is None else options.calibration_tokens,
    )
    seed = options.seed or 0
    texts = calibration_texts(options.calibrate, tokenizer, limits, seed)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with ProgressBars(*columns, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task(f"calibrating {options.model} to {layout.label}, blocks", total=len(spec.blocks))
        return quantize_calibrated(
            folder,
            options.target,
            layout,
            texts,
            CalibrationOptions(seed=seed),
            lambda done, _: bars.update(task, completed=done),
        )
