"""What does a death cost a client, how soon is it seen, and does anything die that should not?

Two nodes on this machine behind one gateway, streams that never stop. A case does the same harm `--kills` times, each
time to a node that runs streams, and waits until both are ready again. Detection: from the signal until the gateway
shows it, which it is asked every 5 ms. Gap: the longest wait between two events of a stream that was under way at the
signal, until all was well again. What dies here shares its cores with what takes over and with the clients. A worker is
killed after some quiet seconds, and, as `again`, as soon as both nodes run streams. Takes about 6 s per harm; knows
nothing of what the tokens are.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from bench.fleet import Fleet, Node, fleet, wait_until
from bench.load import Outcome
from bench.raw_http import RawClient
from bench.result import Report, Row
from bench.shapes import SHAPES, model_folder
from bench.statistics import percentile, spread
from bench.workload import Arrival

STREAMS = 8
PROMPT_TOKENS = 32
OUTPUT_TOKENS = 400
MAX_STEP_SECONDS = 2.0
MAX_RECOVERY_SECONDS = 60.0
# After a harm, until streams run on both nodes for a while.
STEPS_BETWEEN = 60


@dataclass
class Streams:
    """A closed loop in a thread of its own; outcomes may be read while it runs."""

    port: int
    model: str
    seed: str
    outcomes: list[Outcome] = field(default_factory=list)

    @contextmanager
    def running(self, streams: int) -> Iterator[None]:
        """Until the block ends; what is under way goes on to its end."""
        stop = threading.Event()
        thread = threading.Thread(target=lambda: asyncio.run(self._run(streams, stop)))
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()

    async def _run(self, streams: int, stop: threading.Event) -> None:
        client = RawClient("127.0.0.1", self.port, self.model, stream=True)
        numbers = itertools.count()

        async def stream() -> None:
            while not stop.is_set():
                ids = random.Random(f"{self.seed}/{next(numbers)}")
                prompt = [ids.randrange(3, 2_000) for _ in range(PROMPT_TOKENS)]
                outcome = Outcome(time.perf_counter())
                self.outcomes.append(outcome)
                await client.send(prompt, Arrival(0, PROMPT_TOKENS, OUTPUT_TOKENS), outcome)
                outcome.end = time.perf_counter()

        async with asyncio.TaskGroup() as group:
            for _ in range(streams):
                group.create_task(stream())
        await client.close()

    def errors(self) -> list[str]:
        """Of those that have ended."""
        return [outcome.error for outcome in self.outcomes if outcome.error is not None]


@dataclass(frozen=True, slots=True)
class Harm:
    """What was done when, and when it was seen and over."""

    at: float
    seen_at: float
    over_at: float


def gaps(outcomes: Sequence[Outcome], harm: Harm) -> list[float]:
    """The longest wait of every stream that was under way when it happened, of waits that touch the harm's time."""
    found = []
    for outcome in outcomes:
        waits = [
            after - before
            for before, after in itertools.pairwise(outcome.pieces)
            if after > harm.at and before < harm.over_at
        ]
        if waits and outcome.pieces[0] < harm.at:
            found.append(max(waits))
    return found


Do = Callable[[Fleet, Node, int], Callable[[], bool]]
"""Does harm to a node whose worker has this process id, and returns how to see that the gateway knows."""


def _state(running: Fleet, worker_pid: int) -> str:
    return next((one["state"] for one in running.replicas() if one["worker_pid"] == worker_pid), "gone")


def kill_worker(running: Fleet, _: Node, worker_pid: int) -> Callable[[], bool]:
    """SIGKILL to the process that computes."""
    os.kill(worker_pid, signal.SIGKILL)
    return lambda: _state(running, worker_pid) != "ready"


def freeze_worker(running: Fleet, _: Node, worker_pid: int) -> Callable[[], bool]:
    """A step that never ends."""
    os.kill(worker_pid, signal.SIGSTOP)
    return lambda: _state(running, worker_pid) != "ready"


def kill_node(running: Fleet, node: Node, worker_pid: int) -> Callable[[], bool]:
    """SIGKILL to a node; it is started again at once, as an init system would."""
    node.kill()
    return lambda: _state(running, worker_pid) in {"down", "gone"}


def freeze_node(running: Fleet, node: Node, worker_pid: int) -> Callable[[], bool]:
    """No word from a node; until it is seen, then it wakes up."""
    node.freeze()
    return lambda: _state(running, worker_pid) in {"down", "gone"}


def drain_node(running: Fleet, node: Node, worker_pid: int) -> Callable[[], bool]:
    """SIGTERM to a node; it is started again when it has ended."""
    node.process.terminate()
    return lambda: _state(running, worker_pid) != "ready"


@dataclass(frozen=True, slots=True)
class Case:
    """A harm by its name: what may pass by design before it can be seen, and what passes quietly before it."""

    name: str
    do: Do
    allowed_seconds: float = 0.0
    quiet_seconds: float = 0.0


QUIET_SECONDS = 6.0
CASES = (
    Case("kill-worker", kill_worker, quiet_seconds=QUIET_SECONDS),
    Case("kill-worker-again", kill_worker),
    Case("kill-node", kill_node),
    Case("silent-node", freeze_node),
    Case("hung-worker", freeze_worker, MAX_STEP_SECONDS, QUIET_SECONDS),
    Case("restart-node", drain_node),
)


def _victim(running: Fleet, chance: random.Random) -> int:
    """The worker of a replica that has run streams for a while, both being ready."""
    before = {one["node"]: one["steps"] for one in running.replicas()}

    def ripe() -> bool:
        now = running.replicas()
        return all(one["running"] and one["steps"] - before.get(one["node"], 0) > STEPS_BETWEEN for one in now)

    wait_until(ripe, MAX_RECOVERY_SECONDS, "both nodes run streams")
    # Not always at the same point between two reports of a node.
    time.sleep(chance.random() * 0.25)
    pid: int = chance.choice(running.replicas())["worker_pid"]
    return pid


def harm(running: Fleet, case: Case, chance: random.Random) -> Harm:
    """Does it once, and sees it through until both nodes are ready."""
    time.sleep(case.quiet_seconds)
    pid = _victim(running, chance)
    node = running.node_of(pid)
    at = time.perf_counter()
    is_seen = case.do(running, node, pid)
    seen_at = wait_until(is_seen, MAX_RECOVERY_SECONDS, f"{case.name} is seen")
    if case.do is freeze_node:
        node.thaw()
    if case.do in {kill_node, drain_node}:
        node.start_again()
    return Harm(at, seen_at, wait_until(running.all_ready, MAX_RECOVERY_SECONDS, "both nodes are ready"))


def measure(running: Fleet, case: Case, arguments: argparse.Namespace) -> list[Row]:
    """Rows of one case: detection, gaps, and how many streams did not end well."""
    chance = random.Random(f"{arguments.seed}/{case.name}")
    # Requests of its own: what an earlier case has sent is cached, and is computed faster when a replica takes it over.
    streams = Streams(running.port, running.model(), f"{arguments.seed}/{case.name}")
    with streams.running(STREAMS):
        harms = [harm(running, case, chance) for _ in range(arguments.kills)]
    seen = [one.seen_at - one.at - case.allowed_seconds for one in harms]
    of_each = [gaps(streams.outcomes, one) for one in harms]
    waits = [wait for waits in of_each for wait in waits]
    worst = max(waits)
    rows = [
        Row.of(f"{case.name}/detection", "s", spread(seen)),
        Row.of(f"{case.name}/gap", "s", spread(waits)),
        Row(f"{case.name}/gap-p99", percentile(waits, 99), "s", min(waits), worst, len(waits)),
        Row.of(f"{case.name}/until-ready", "s", spread([one.over_at - one.at for one in harms])),
    ]
    failed, count = len(streams.errors()), len(streams.outcomes)
    return [*rows, Row(f"{case.name}/failed-streams", failed, f"of {count}", failed, failed, len(harms))]


def saturate(running: Fleet, arguments: argparse.Namespace) -> list[Row]:
    """Far more streams than the machine can serve at once, and nothing done to it: whatever is lost is a false loss."""
    streams = Streams(running.port, running.model(), f"{arguments.seed}/saturated")
    losses = running.metric("front_lost_attempts_total")
    pids = sorted(one["worker_pid"] for one in running.replicas())
    with streams.running(8 * STREAMS):
        time.sleep(arguments.seconds)
    lost = running.metric("front_lost_attempts_total") - losses
    died = sum(pid not in pids for pid in (one["worker_pid"] for one in running.replicas()))
    name = f"saturated-{arguments.seconds:g}s"
    failed, count = len(streams.errors()), len(streams.outcomes)
    return [
        Row(f"{name}/false-losses", lost, f"of {count}", lost, lost, 1),
        Row(f"{name}/false-deaths", died, "workers", died, died, 1),
        Row(f"{name}/failed-streams", failed, f"of {count}", failed, failed, 1),
    ]


def _chosen(names: str | None) -> list[Case]:
    """All of them by default; "none" leaves saturation alone."""
    if names is None:
        return list(CASES)
    if names == "none":
        return []
    known = {case.name: case for case in CASES}
    unknown = [name for name in names.split(",") if name not in known]
    if unknown:
        raise SystemExit(f"there is no case {unknown[0]!r}; there are {', '.join(known)}, or none for saturation alone")
    return [known[name] for name in names.split(",")]


def main(arguments: argparse.Namespace) -> Report:
    """The cases that `--cases` names, or all, on one fleet, then saturation."""
    if arguments.kills < 3:
        raise SystemExit(f"--kills is {arguments.kills}; a median with a spread needs 3 at least")
    cases = _chosen(arguments.cases)
    options = ["--threads", str(arguments.threads or 1), "--max-step-seconds", str(MAX_STEP_SECONDS)]
    began = time.perf_counter()
    rows = []
    model = arguments.model or "tiny-chat"
    with fleet(str(model_folder(model)) if model in SHAPES else model, 2, *options) as running:
        ready = time.perf_counter() - began
        rows.append(Row("start/both-ready", ready, "s", ready, ready, 1))
        for case in cases:
            rows += measure(running, case, arguments)
        rows += saturate(running, arguments)
    return Report("failover", arguments.seed, rows)
