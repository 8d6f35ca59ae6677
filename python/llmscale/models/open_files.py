"""The files of a checkpoint while their tensors are read: slices by tensor name, with progress.

A file is mapped when its first tensor is asked for; at most sixteen stay mapped, since a checkpoint may have thousands
of shards and a process a thousand descriptors. Only the pages of a slice are touched. It does not know models.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, Self

from safetensors import SafetensorError, safe_open
from torch import Tensor

from llmscale.errors import InvalidCheckpoint
from llmscale.models.checkpoint import Checkpoint, Progress

MAX_MAPPED = 16

Span = tuple[int, int] | None
"""First and last entry (excluded) along an axis; None for all."""


class OpenFiles:
    """A context in which tensors can be read; `names` are those that count as progress."""

    def __init__(self, checkpoint: Checkpoint, names: Sequence[str], progress: Progress | None) -> None:
        self._checkpoint = checkpoint
        self._left = set(names)
        self._progress = progress
        self._total_bytes = sum(self._bytes(name) for name in self._left)
        self._done_bytes = 0
        self._mapped: OrderedDict[str, tuple[Any, contextlib.ExitStack]] = OrderedDict()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        while self._mapped:
            self._mapped.popitem()[1][1].close()

    def read(self, name: str, spans: tuple[Span, ...]) -> Tensor:
        """A tensor, or its part within a span per leading axis. It may be a view of the file: copy what is kept.

        Raises InvalidCheckpoint.
        """
        file_name = self._checkpoint.tensors[name].file
        try:
            file = self._file(file_name)
            if any(spans):
                whole = slice(None)
                tensor: Tensor = file.get_slice(name)[tuple(slice(*span) if span else whole for span in spans)]
            else:
                tensor = file.get_tensor(name)
        except SafetensorError as error:
            raise InvalidCheckpoint(f"{file_name!r} cannot be read: {error}.") from error
        self._note(name)
        return tensor

    def _file(self, name: str) -> Any:
        if name in self._mapped:
            self._mapped.move_to_end(name)
            return self._mapped[name][0]
        if len(self._mapped) == MAX_MAPPED:
            self._mapped.popitem(last=False)[1][1].close()
        stack = contextlib.ExitStack()
        path = str(self._checkpoint.files[name])
        file = stack.enter_context(safe_open(path, framework="pt", device="cpu"))
        self._mapped[name] = (file, stack)
        return file

    def _note(self, name: str) -> None:
        if name not in self._left:
            return
        self._left.remove(name)
        self._done_bytes += self._bytes(name)
        if self._progress is not None:
            self._progress(self._done_bytes, self._total_bytes)

    def _bytes(self, name: str) -> int:
        entry = self._checkpoint.tensors[name]
        return entry.end - entry.begin
