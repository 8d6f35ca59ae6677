"""Reads the weights of a checkpoint into the fused tensors of an executor.

Every tensor is copied once, from the mapped file into memory that the process owns, converted, quantized and fused on
the way: a file that is changed or truncated while it is served cannot crash the worker. Costs one pass over the
checkpoint, and memory for the weights as they are computed with. With `open_files` it is all of this package that
imports torch. It does not know how weights are used.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from llmscale.errors import ConfigError, InvalidCheckpoint, ModelError
from llmscale.models.checkpoint import Checkpoint, Progress, compute_dtype, match_tensors, open_checkpoint
from llmscale.models.fingerprint import weights_fingerprint
from llmscale.models.folder import ModelFolder
from llmscale.models.open_files import OpenFiles
from llmscale.models.shard import RankModel, TensorSlice, whole_model
from llmscale.models.spec import ModelSpec, TensorSpec, WeightSpec
from llmscale.models.stored import stored_weights
from llmscale.models.tied_tables import refuse_different_tables
from llmscale.quant.layouts import Cut, whole_cut
from llmscale.quant.method import method_for
from llmscale.quant.weight import QuantizedWeight, stacked


class Weights:
    """The weights of a model by their spec on one device: dense ones of one dtype, quantized ones as they are."""

    __slots__ = ("_quantized", "_tensors", "dtype", "fingerprint")

    def __init__(
        self,
        tensors: dict[str, Tensor],
        dtype: torch.dtype,
        fingerprint: str,
        quantized: dict[str, QuantizedWeight] | None = None,
    ) -> None:
        self._tensors = tensors
        self._quantized = quantized or {}
        self.dtype = dtype
        self.fingerprint = fingerprint

    def __getitem__(self, weight: WeightSpec) -> Tensor:
        """A dense weight."""
        return self._tensors[weight.name]

    def take(self, weight: WeightSpec) -> Tensor | QuantizedWeight:
        """Hands a weight over: it is not held here afterwards, so that whoever converts it can free the original."""
        quantized = self._quantized.pop(weight.name, None)
        return self._tensors.pop(weight.name) if quantized is None else quantized

    @property
    def total_bytes(self) -> int:
        """Bytes of the weights that are held."""
        return sum(tensor.nbytes for tensor in self._tensors.values()) + sum(
            weight.total_bytes for weight in self._quantized.values()
        )


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """How to load. `dtype` is "auto", "bfloat16" or "float32"; see `compute_dtype` for what "auto" means."""

    dtype: str = "auto"
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    progress: Progress | None = None


def load_weights(
    folder: ModelFolder, spec: ModelSpec, options: LoadOptions | None = None, part: RankModel | None = None
) -> Weights:
    """Loads the weights of `spec` from a Hugging Face folder, or of one rank's part of it; other bytes are not read.

    Raises InvalidCheckpoint if anything is malformed, missing, surplus or mismatched; ConfigError for an unknown dtype.
    """
    options = options or LoadOptions()
    checkpoint = open_checkpoint(folder)
    match_tensors(spec, checkpoint)
    refuse_different_tables(spec, checkpoint)
    dtype = getattr(torch, compute_dtype(options.dtype, spec, checkpoint, options.device.type))
    assert isinstance(dtype, torch.dtype)
    reading = _Reading(part or whole_model(spec), spec, checkpoint, options)
    with reading.files:
        tensors, quantized = reading.run(dtype)
    return Weights(tensors, dtype, weights_fingerprint(checkpoint), quantized)


class _Reading:
    """One pass over the weights of a part in the order of computation, so that what is quantized while it is loaded is
    dense for one projection at a time."""

    def __init__(self, part: RankModel, whole: ModelSpec, checkpoint: Checkpoint, options: LoadOptions) -> None:
        self._spec = part.spec
        self._slices = part.slices
        self._device = options.device
        self._checkpoint = checkpoint
        self._stored = stored_weights(whole, checkpoint.tensors)
        quantization = whole.quantization
        self._method = None if quantization is None else method_for(quantization.layout)
        self._made: set[str] = set()
        if quantization is not None and not quantization.is_stored:
            # A head is quantized where the checkpoint says so, never by us: every token's choice hangs on it.
            head = self._spec.head.weight.name
            self._made = {linear.weight.name for linear in self._spec.linears()} - {head}
        self.files = OpenFiles(checkpoint, self._names(), options.progress)

    def run(self, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, QuantizedWeight]]:
        """The dense weights in a dtype and the quantized ones, by name."""
        tensors: dict[str, Tensor] = {}
        quantized: dict[str, QuantizedWeight] = {}
        for weight in self._spec.weights():
            if weight.name in self._stored:
                quantized[weight.name] = self._read_stored(weight)
            elif weight.name in self._made:
                quantized[weight.name] = self._make(weight)
            else:
                tensors[weight.name] = self._read_dense(weight, dtype)
        return tensors, quantized

    def _names(self) -> list[str]:
        """Every tensor that is read."""
        names: list[str] = []
        for weight in self._spec.weights():
            if weight.name in self._stored:
                stored = [
                    name
                    for part in self._stored[weight.name]
                    for name, tensor in part.named_tensors()
                    if tensor.is_read
                ]
                names.extend(name for name in stored if name in self._checkpoint.tensors)
            else:
                names.extend(self._dense_name(part) for part in weight.parts)
        return names

    def _dense_name(self, part: TensorSpec) -> str:
        """A tied table may be stored under the head's name alone."""
        tied_name = self._spec.head.tied_name
        return part.name if tied_name is None or part.name in self._checkpoint.tensors else tied_name

    def _read_dense(self, weight: WeightSpec, dtype: torch.dtype) -> Tensor:
        whole = torch.empty(weight.shape, dtype=dtype, device=self._device)
        row = 0
        for part in weight.parts:
            source = self._read_part(part)
            rows = whole.narrow(0, row, part.shape[0])
            if rows.shape != source.shape:
                raise InvalidCheckpoint(f"The part of {weight.name!r} changed while it was read. Load it again.")
            rows.copy_(source)
            row += part.shape[0]
        return whole

    def _read_part(self, part: TensorSpec) -> Tensor:
        taken = self._slices.get(part.name)
        name = self._dense_name(part)
        if taken is None:
            return self.files.read(name, ())
        span = (taken.start, taken.stop)
        return self.files.read(name, (span,) if taken.axis == 0 else (None, span))

    def _make(self, weight: WeightSpec) -> QuantizedWeight:
        """Quantizes part by part; only one part is dense at a time."""
        assert self._method is not None, weight.name
        made = []
        for part in weight.parts:
            with _naming(part):
                made.append(self._method.quantize(self._read_part(part)))
        return _on_device(stacked(made, weight.name), self._device)

    def _read_stored(self, weight: WeightSpec) -> QuantizedWeight:
        assert self._method is not None, weight.name
        loaded = []
        for part, stored in zip(weight.parts, self._stored[weight.name], strict=True):
            cut = _cut_of(stored.shape, self._slices.get(part.name))
            tensors = {
                # Copied: what a method keeps must not be a view of the file.
                tensor.suffix: self.files.read(name, tuple(axis.span(cut) for axis in tensor.axes)).clone()
                for name, tensor in stored.named_tensors()
                if tensor.is_read and name in self._checkpoint.tensors
            }
            with _naming(part):
                loaded.append(self._method.load(tensors, cut))
        return _on_device(stacked(loaded, weight.name), self._device)


@contextlib.contextmanager
def _naming(part: TensorSpec) -> Iterator[None]:
    """A method does not know whose values it gets; its errors say so."""
    try:
        yield
    except (ConfigError, ModelError) as error:
        raise type(error)(f"{part.name!r}: {error}") from error


def _cut_of(shape: tuple[int, int], taken: TensorSlice | None) -> Cut:
    if taken is None:
        return whole_cut(shape)
    span = (taken.start, taken.stop)
    return Cut(span, (0, shape[1]), shape) if taken.axis == 0 else Cut((0, shape[0]), span, shape)


def _on_device(weight: QuantizedWeight, device: torch.device) -> QuantizedWeight:
    def moved(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(device)

    return replace(
        weight,
        codes=weight.codes.to(device),
        scales=weight.scales.to(device),
        zeros=moved(weight.zeros),
        order=moved(weight.order),
    )
