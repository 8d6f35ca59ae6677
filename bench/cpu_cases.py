"""Who takes part in `bench cpu`: every runtime with every format that it has, and how each is run.

Peers lie in one folder (see bench/README.md); what is not there is "not installed". Each runtime with each format is a
process of its own, one after the other; `LLMSCALE_BENCH_LOCK` names a file that is locked while one runs, for machines
where others measure or build too. Knows nothing of what is made of the figures.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from bench import peers
from bench.disturbance import Watch
from bench.shapes import SHAPES, model_folder
from bench.statistics import Spread

OURS = "llmscale"
SCHEMES = ("bf16", "int8", "int4")
LOCK_VARIABLE = "LLMSCALE_BENCH_LOCK"
MAX_TURN_SECONDS = 120.0
"""After it the lock is given back when a process ends."""
MAX_OTHERS_SHARE = 0.05
"""Above it figures are disturbed, and the report says so."""
NO_SERVER = "no server"
"""Of a peer that is a library."""
NO_MODEL = "no model"
"""Of a peer that is there without this model in this format."""


@dataclass(frozen=True, slots=True)
class Variant:
    """A runtime with weights in one format. `scheme` is the class that it is compared in."""

    runtime: str
    label: str
    scheme: str

    @property
    def name(self) -> str:
        """As tables show it."""
        return f"{self.runtime} {self.label}"


VARIANTS = (
    *(Variant(OURS, scheme, scheme) for scheme in SCHEMES),
    Variant("llama.cpp", "bf16", "bf16"),
    Variant("llama.cpp", "Q8_0", "int8"),
    Variant("llama.cpp", "Q4_0", "int4"),
    Variant("openvino", "fp16", "bf16"),
    Variant("openvino", "int8", "int8"),
    Variant("openvino", "int4", "int4"),
    Variant("vllm", "bf16", "bf16"),
    Variant("vllm", "int8", "int8"),
)
PEERS = tuple(dict.fromkeys(variant.runtime for variant in VARIANTS if variant.runtime != OURS))

Measured = dict[tuple[Variant, str, str], Spread | str]
"""By variant, model and case: what was measured, or why nothing was."""


@dataclass(frozen=True, slots=True)
class Lineup:
    """Which variants run, and where peers are."""

    variants: tuple[Variant, ...]
    folder: Path | None
    others: dict[str, float] = field(default_factory=dict)
    """Filled while variants run: the share of the machine that was used by anything else, by what ran."""

    def missing(self, variant: Variant, model: str) -> str | None:
        """Why this variant cannot run on this model; None where it can."""
        if variant.runtime == OURS:
            return None
        program = self.program(variant.runtime)
        if program is None or not program.exists():
            return peers.NOT_INSTALLED
        return None if self._needed(variant, model).exists() else NO_MODEL

    def program(self, runtime: str) -> Path | None:
        """What must be there for a peer to be installed: its Python, or llama.cpp's folder of programs."""
        if self.folder is None:
            return None
        return self.folder / ("llama.cpp/bin" if runtime == "llama.cpp" else f"{runtime}/bin/python")

    def model(self, variant: Variant, model: str) -> Path:
        """What the script of `bench.peers` takes as its `--model`."""
        dense = variant.runtime == OURS or variant.name == "vllm bf16"
        if dense or self.folder is None:
            return model_folder(model)
        return self.folder / "models" / f"{model}-{variant.label}"

    def only(self, scheme: str) -> Lineup:
        """The variants of one scheme."""
        return Lineup(tuple(variant for variant in self.variants if variant.scheme == scheme), self.folder, self.others)

    def of(self, runtime: str) -> Lineup:
        """The variants of one runtime."""
        return Lineup(tuple(variant for variant in self.variants if variant.runtime == runtime), None, self.others)

    def _needed(self, variant: Variant, model: str) -> Path:
        suffix = {"llama.cpp": ".gguf", "openvino": "-openvino"}.get(variant.runtime, "")
        path = self.model(variant, model)
        return path.with_name(path.name + suffix)


def choose(peers_folder: Path | None, schemes: str | None, runtimes: str | None) -> Lineup:
    """Variants of these schemes and runtimes (comma-separated; None for all). Raises ValueError for unknown ones."""
    wanted_schemes = _chosen("schemes", schemes, SCHEMES)
    wanted_runtimes = _chosen("runtimes", runtimes, (OURS, *PEERS))
    chosen = [v for v in VARIANTS if v.scheme in wanted_schemes and v.runtime in wanted_runtimes]
    return Lineup(tuple(chosen), peers_folder)


def _chosen(option: str, given: str | None, known: tuple[str, ...]) -> tuple[str, ...]:
    names = known if given is None else tuple(given.split(","))
    if unknown := sorted(set(names) - set(known)):
        raise ValueError(f"--{option} has {', '.join(unknown)}; there are {', '.join(known)}")
    return names


def run_offline(
    lineup: Lineup, model: str, cases: tuple[str, ...], repeats: int, seed: int, threads: int, found: Measured
) -> None:
    """The offline cases (`bench.offline_cases`) of one model on all variants, in their order, into `found`."""
    for variant in lineup.variants:
        result: dict[str, Spread] | str | None = lineup.missing(variant, model)
        if result is None:
            result = _run(lineup, variant, model, cases, repeats, seed, threads)
        for case in cases:
            found[variant, model, case] = result if isinstance(result, str) else result.get(case, "failed")
            tell(f"{model}/{case}", variant, found[variant, model, case])


def tell(case: str, variant: Variant, value: Spread | str) -> None:
    """On standard error, at once: a run takes long, and one that is cut off has still said something."""
    text = (
        value if isinstance(value, str) else f"{value.median:.5g} ({value.low:.5g}-{value.high:.5g}, n={value.repeats})"
    )
    print(f"{case} {variant.name}: {text}", file=sys.stderr, flush=True)


def _run(
    lineup: Lineup, variant: Variant, model: str, cases: tuple[str, ...], repeats: int, seed: int, threads: int
) -> dict[str, Spread] | str:
    folder = lineup.model(variant, model)
    task = peers.Task(folder, SHAPES[model].vocabulary, cases, repeats, seed, threads, variant.scheme)
    program, environment = sys.executable, dict[str, str]()
    if variant.runtime == "llama.cpp":
        environment["PATH"] = f"{lineup.program(variant.runtime)}{os.pathsep}{os.environ['PATH']}"
    elif variant.runtime != OURS:
        program = str(lineup.program(variant.runtime))
        # A peer must not see our packages, which may be built for another Python.
        environment["PYTHONPATH"] = ""
    with machine_for_us(lineup.others, f"{model}/offline {variant.name}"):
        return peers.measure(program, variant.runtime.replace(".", ""), task, environment=environment)


class _Turn:
    """The lock on the file that LLMSCALE_BENCH_LOCK names. It is kept from one process to the next until a turn is
    over, so that one variant can follow the other where many wait for the machine.
    """

    def __init__(self) -> None:
        self._descriptor: int | None = None
        self._since = 0.0

    def take(self, path: str) -> None:
        """Waits until the machine is ours."""
        if self._descriptor is None:
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            fcntl.flock(self._descriptor, fcntl.LOCK_EX)
            self._since = time.monotonic()

    def give(self) -> None:
        """Lets others have it, where this turn is over."""
        if self._descriptor is not None and time.monotonic() - self._since > MAX_TURN_SECONDS:
            os.close(self._descriptor)
            self._descriptor = None


_TURN = _Turn()


@contextlib.contextmanager
def machine_for_us(others: dict[str, float], name: str) -> Iterator[Watch]:
    """Waits for the file that LLMSCALE_BENCH_LOCK names, where it names one; notes what others used meanwhile all the
    same, the most of several times.
    """
    if path := os.environ.get(LOCK_VARIABLE):
        _TURN.take(path)
    watch = Watch()
    try:
        yield watch
    finally:
        if (share := watch.stop()) is not None:
            others[name] = max(share, others.get(name, 0.0))
            if share > MAX_OTHERS_SHARE:
                print(f"{name}: others used {share:.0%} of the machine", file=sys.stderr, flush=True)
        _TURN.give()
