"""What do ranks cost? Sums in memory and over TCP, a stream to the next stage and ids back, a step's meetings."""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnContext
from pathlib import Path
from typing import TYPE_CHECKING

from bench.result import Report, Row
from bench.shapes import SHAPES, model_folder
from bench.statistics import spread
from llmscale.parallel.assignment import Meeting

if TYPE_CHECKING:
    # Torch is imported by the ranks alone, after its threads were told how to wait.
    from llmscale.parallel.pipeline import StageLink

RANKS = 2
CONTEXT_TOKENS = 256
BATCHES = (1, 8, 32)
WIDTHS = (576, 4_608, 294_912)
"""Elements of bfloat16: the stream of a 135M model with 1, 8 and 512 rows."""
MAX_SECONDS = 300.0


@dataclass(frozen=True, slots=True)
class Task:
    """What the processes of one run are told."""

    folder: Path
    memory: str
    stages: tuple[Meeting, ...]
    rendezvous: str
    batches: tuple[int, ...]
    steps: int
    repeats: int


def main(arguments: argparse.Namespace) -> Report:
    """Two processes with one thread and one core each. `overhead` is a step's time with the exchanges less the same
    step's without them, in turns; what one worker with two threads needs stands beside the step."""
    name = arguments.model or "tiny-chat"
    from llmscale.errors import ConfigError
    from llmscale.models.locate import locate_model
    from llmscale.models.registry import describe_model
    from llmscale.models.shard import RankPlace, shard_model

    folder = model_folder(name) if name in SHAPES else locate_model(name)
    try:
        shard_model(describe_model(folder).spec, RankPlace(0, RANKS))
    except ConfigError as error:
        raise SystemExit(f"--model {name}: {error}") from error
    steps = 40 if arguments.quick else 200
    batches = BATCHES[:2] if arguments.quick else BATCHES
    with tempfile.TemporaryDirectory(prefix="llmscale-bench-") as scratch:
        found = _run(folder, Path(scratch), batches, steps, arguments.repeats)
    rows = []
    for width in WIDTHS:
        gloo = spread(found[f"gloo/{width}"]).median
        for case in (f"sum/{width}", f"sum-streams/{width}"):
            rows.append(Row.of(case, "us", spread(found[case]), peers={"gloo": gloo}))
        for case in (f"stages/{width}", f"stages-streams/{width}"):
            rows.append(Row.of(case, "us", spread(found[case])))
    for batch in batches:
        whole = spread(found[f"whole/{batch}"]).median
        rows.append(Row.of(f"step/{batch}", "ms", spread(found[f"step/{batch}"]), peers={"one worker": whole}))
        rows.append(Row.of(f"overhead/{batch}", "ms", spread(found[f"overhead/{batch}"])))
    return Report("ranks", arguments.seed, rows)


def _run(folder: Path, scratch: Path, batches: tuple[int, ...], steps: int, repeats: int) -> dict[str, list[float]]:
    from llmscale.models.shard import RankPlace
    from llmscale.node.rank_meeting import RankMeeting
    from llmscale.parallel.layout import HostLayout

    sums, stages = RankMeeting(HostLayout(RANKS)), RankMeeting(HostLayout(1, RANKS))
    meetings = tuple(stages.of(RankPlace(0, 1, stage, RANKS)) for stage in range(RANKS))
    memory = sums.of(RankPlace(0, RANKS)).memory
    assert memory is not None, "ranks that share layers share memory"
    task = Task(folder, memory, meetings, f"file://{scratch / 'store'}", batches, steps, max(5, repeats))
    context = SpawnContext()
    receiver, sender = context.Pipe(duplex=False)
    ranks = [context.Process(target=_rank, args=(rank, task, sender)) for rank in range(RANKS)]
    for process in ranks:
        process.start()
    # Theirs are what is left: the end of a rank that raises is an end here too.
    sender.close()
    try:
        if not receiver.poll(MAX_SECONDS):
            raise SystemExit(f"the ranks did not finish within {MAX_SECONDS:.0f} s")
        try:
            found: dict[str, list[float]] = receiver.recv()
        except EOFError:
            raise SystemExit("the ranks ended early; what they said stands above") from None
        for process in ranks:
            process.join(30)
    finally:
        for process in ranks:
            process.kill()
        sums.close()
        stages.close()
    return found


def _rank(rank: int, task: Task, sender: Connection) -> None:
    """One process: all measurements, in step with the other."""
    from llmscale import env

    cpus = sorted(os.sched_getaffinity(0))
    if len(cpus) >= RANKS:
        os.sched_setaffinity(0, {cpus[rank]})
    env.prepare_for_torch()
    env.prepare_for_torch_distributed("lo")
    import torch
    import torch.distributed

    from llmscale.models.shard import RankPlace
    from llmscale.parallel.groups import join_stages, join_tensor_group, join_world

    torch.set_num_threads(1)
    place = RankPlace(rank, RANKS)
    group = join_tensor_group(place, Meeting(task.memory), "bfloat16")
    stage = RankPlace(0, 1, rank, RANKS)
    there = Meeting(rendezvous=task.rendezvous)
    world = join_world(stage, there)
    distant = join_stages(stage, there, world)
    streams = join_tensor_group(place, there, "bfloat16", world)
    channels = join_stages(stage, task.stages[rank])
    assert distant is not None, "there are two stages"
    assert channels is not None, "there are two stages"
    found: dict[str, list[float]] = {}
    ids = torch.zeros(8, dtype=torch.int32)
    for width in WIDTHS:
        stream = torch.ones(width, dtype=torch.bfloat16)

        def there_and_back(link: StageLink, stream: torch.Tensor = stream) -> None:
            if rank == 0:
                link.send_stream(stream)
                link.receive_tokens(ids)
            else:
                link.receive_stream(stream)
                link.send_tokens(ids)

        found[f"sum/{width}"] = _microseconds(lambda stream=stream: group.sum(stream), task)
        found[f"sum-streams/{width}"] = _microseconds(lambda stream=stream: streams.sum(stream), task)
        found[f"gloo/{width}"] = _microseconds(lambda stream=stream: torch.distributed.all_reduce(stream), task)
        for name, link in (("stages", channels), ("stages-streams", distant)):
            found[f"{name}/{width}"] = _microseconds(lambda link=link: there_and_back(link), task)
    found |= _steps(task, place)
    torch.distributed.barrier()
    if rank == 0 and len(cpus) >= RANKS:
        os.sched_setaffinity(0, set(cpus))
    if rank == 0:
        found |= _whole(task)
        sender.send(found)
    torch.distributed.destroy_process_group()


def _microseconds(call: Callable[[], object], task: Task) -> list[float]:
    """Mean time of one call, over `steps` calls, `repeats` times."""
    for _ in range(20):
        call()
    times = []
    for _ in range(task.repeats):
        began = time.perf_counter()
        for _ in range(task.steps):
            call()
        times.append((time.perf_counter() - began) / task.steps * 1e6)
    return times


def _steps(task: Task, place: object) -> dict[str, list[float]]:
    """Decoding steps of one rank's half of the model, with and without meeting the other."""
    from bench.rank_executor import RankExecutor

    executor = RankExecutor(task.folder, place, task.memory)
    found: dict[str, list[float]] = {}
    for batch in task.batches:
        step = executor.decode_step(batch, CONTEXT_TOKENS)
        with_others, without, differences = [], [], []
        for _ in range(task.repeats):
            with_others.append(executor.milliseconds(step, task.steps, meet=True))
            without.append(executor.milliseconds(step, task.steps, meet=False))
            differences.append(with_others[-1] - without[-1])
        found |= {f"step/{batch}": with_others, f"overhead/{batch}": differences}
    return found


def _whole(task: Task) -> dict[str, list[float]]:
    """The same steps of the whole model in one process with a thread per core."""
    import torch

    from bench.rank_executor import RankExecutor

    torch.set_num_threads(RANKS)
    executor = RankExecutor(task.folder, None, None, threads=RANKS)
    return {
        f"whole/{batch}": [
            executor.milliseconds(executor.decode_step(batch, CONTEXT_TOKENS), task.steps, meet=True)
            for _ in range(task.repeats)
        ]
        for batch in task.batches
    }
