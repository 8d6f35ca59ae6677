"""Graphs of a device that is none: work that is repeated as it was recorded, if it may be recorded at all.

While work is recorded, reading a value back and allocating are refused. A replay does the same operations again and
refuses to when one of them would read or write other memory than the first time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from llmscale.errors import WorkerError
from tests.fakes.fake_device.machine import Machine

READ_BACKS = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "item")

VIEWS = ("slice", "view", "t", "transpose", "select", "as_strided", "alias", "detach")
"""These touch no memory."""


class Watch(TorchDispatchMode):
    """Sees which memory operations touch that they have not made."""

    def __init__(self, machine: Machine, *, strict: bool) -> None:
        super().__init__()
        self._machine = machine
        self._strict = strict
        self._made: set[int] = set()
        self._kernel = False
        self.touched: set[int] = set()
        self.refused: str | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if self._kernel:
            return result
        name = func.__name__.split(".")[0]
        if name in READ_BACKS:
            self.refused = f"{name} reads a value back"
        given = {tensor.untyped_storage().data_ptr() for tensor in _tensors((args, kwargs))}
        for tensor in _tensors(result):
            storage = tensor.untyped_storage().data_ptr()
            if storage not in given and storage not in self._made:
                self._made.add(storage)
                if self._strict:
                    self.refused = f"{name} allocates"
        if name not in VIEWS:
            self.touched |= given - self._made
        return result

    @contextlib.contextmanager
    def kernel(self, *tensors: Tensor) -> Iterator[None]:
        """What happens inside happens on the device, with these tensors."""
        self.touched |= {
            tensor.data_ptr() for tensor in tensors if tensor.untyped_storage().data_ptr() not in self._made
        }
        self._kernel = True
        try:
            yield
        finally:
            self._kernel = False


def _tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for part in value:
            yield from _tensors(part)
    elif isinstance(value, dict):
        yield from _tensors(tuple(value.values()))


class FakeGraph:
    """See `Graph`."""

    def __init__(self, machine: Machine, work: Callable[[], object]) -> None:
        self._machine = machine
        self._work = work
        self._touched = self._watched()

    def __call__(self) -> None:
        if self._watched() != self._touched:
            raise self._machine.broken("a graph's memory has moved since it was captured")

    def _watched(self) -> set[int]:
        machine = self._machine
        watch = Watch(machine, strict=machine.script.strict)
        machine.recording = watch
        try:
            with watch:
                self._work()
        finally:
            machine.recording = None
        if watch.refused is not None:
            raise WorkerError(f"a step could not be captured: {watch.refused}")
        return watch.touched


def kernel(machine: Machine, *tensors: Tensor) -> contextlib.AbstractContextManager[None]:
    """Marks what a kernel of the device does."""
    if isinstance(machine.recording, Watch):
        return machine.recording.kernel(*tensors)
    return contextlib.nullcontext()
