"""`python -m llmscale.node --model DIR`: one node on this host, until SIGTERM or SIGINT.

Prints one line when fronts can connect and one when the first step has run. SIGTERM drains: waiting work goes back to
its fronts, running work ends, what is cached goes to the disk tier, then the process exits with code 0; a second
SIGTERM ends it at once. Where a replica spans hosts the same command runs on
each; the first host owns the engine, the others start and end ranks as it says.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import secrets
import signal
import sys
import tempfile
import time
from pathlib import Path

from llmscale import env, logs
from llmscale._core import Engine, end_with_parent
from llmscale.config import DEVICES, DTYPES, EXECUTORS, KV_DTYPES, MAX_DRAIN_SECONDS, QUANTIZATIONS, NodeSettings
from llmscale.errors import LlmscaleError
from llmscale.logs import get_logger
from llmscale.models.end_signals import unwound_by_signals
from llmscale.node.disk_folder import DiskFolder
from llmscale.node.follower import Follower
from llmscale.node.membership import Membership
from llmscale.node.plan import ReplicaPlan, plan_replica
from llmscale.node.span import Span, connect_to_leader, host_facts
from llmscale.node.stop_signal import StopSignal
from llmscale.node.supervisor import WorkerSupervisor
from llmscale.node.worker_process import WorkerProcesses
from llmscale.parallel.hosts import HostFlags, Hosts, resolve_hosts

_log = get_logger("llmscale.node")


def main() -> int:
    """Parses the command line and serves."""
    arguments = _parser().parse_args()
    logs.configure()
    if arguments.parent is not None:
        end_with_parent(arguments.parent)
    try:
        hosts = resolve_hosts(env.launcher_environment(), _host_flags(arguments))
        if not hosts.acts:
            _log.info("another process runs this host; this one has nothing to do", host=hosts.index)
            return 0
        settings = _settings(arguments)
        plan = _planned(settings, hosts)
        if plan is not None:
            asyncio.run(_serve(settings, hosts, plan))
    except LlmscaleError as error:
        _log.error("the node ends", reason=str(error), code=error.code)
        return 1
    except OSError as error:
        # A file that may not be read, a full disk: the message names it.
        _log.error("the node ends", reason=str(error), code="system")
        return 1
    return 0


def _planned(settings: NodeSettings, hosts: Hosts) -> ReplicaPlan | None:
    """The plan; None if the node was asked to end meanwhile. A file may be imported for it, which takes minutes, and an
    event loop hears no signal while something waits in it."""
    try:
        with unwound_by_signals(signal.SIGUSR1):
            return plan_replica(settings, hosts.count)
    except (SystemExit, KeyboardInterrupt):
        _log.info("the node was asked to end before it had read its model")
        return None


async def _serve(settings: NodeSettings, hosts: Hosts, plan: ReplicaPlan) -> None:
    # Before there is a folder or a process: whoever ends a node that starts finds nothing of it afterwards.
    stop = StopSignal.listen()
    processes = WorkerProcesses(
        plan.threads_of_worker(settings), keep_spare=settings.spare_worker, executor=plan.executor
    )
    disk = None if settings.kv_disk is None else DiskFolder(settings.kv_disk)
    try:
        await _act(settings, hosts, plan, processes, disk, stop)
    finally:
        if disk is not None:
            disk.close()


async def _act(
    settings: NodeSettings,
    hosts: Hosts,
    plan: ReplicaPlan,
    processes: WorkerProcesses,
    disk: DiskFolder | None,
    stop: StopSignal,
) -> None:
    if not hosts.is_leader:
        await _follow(settings, hosts, plan, processes, disk, stop)
        return
    # Only this user may enter: worker links are not authenticated beyond the folder's permissions.
    with tempfile.TemporaryDirectory(prefix="llmscale-node-") as folder:
        span = None if hosts.count == 1 else Span.open(settings, hosts, plan)
        try:
            await _lead(settings, plan, processes, span, folder, disk, stop)
        finally:
            if span is not None:
                span.close()


async def _lead(
    settings: NodeSettings,
    plan: ReplicaPlan,
    processes: WorkerProcesses,
    span: Span | None,
    folder: str,
    disk: DiskFolder | None,
    stop: StopSignal,
) -> None:
    engine = Engine(
        limits=plan.limits,
        name=plan.name,
        revision=plan.revision,
        weights_digest=plan.weights_digest,
        tokenizer_digest=plan.tokenizer_digest,
        fleet=settings.fleet,
        listen=settings.listen,
        link_folder=folder,
        max_fronts=settings.max_fronts,
        max_step_us=int(settings.max_step_seconds * 1e6),
        step_target_us=math.ceil(settings.step_target_milliseconds * 1e3),
        key_file=None if settings.key_file is None else str(settings.key_file),
        allow_list=None if settings.allow_list is None else str(settings.allow_list),
        disk_index=None if disk is None else disk.index,
    )
    _log.info("node listens", address=engine.address, **_said(plan, plan.threads_of_worker(settings)))
    supervisor = WorkerSupervisor(engine, plan, processes, span, disk)
    supervising = asyncio.create_task(supervisor.run())
    announcing = asyncio.create_task(_announce(supervisor))
    stopping = asyncio.create_task(stop.asked.wait())
    await asyncio.wait({supervising, stopping}, return_when=asyncio.FIRST_COMPLETED)
    announcing.cancel()
    if not supervising.done():
        if span is not None:
            span.group.drain()
        await _drain(engine, supervisor, supervising, stop, settings.max_saving_seconds)
    await supervisor.stop()
    # It tells the engine of the deaths that `stop` has caused.
    await asyncio.wait({supervising})
    engine.close()
    stopping.cancel()
    await supervising


def _said(plan: ReplicaPlan, threads: int) -> dict[str, object]:
    """What an operator wants to know of a replica before its worker is there, the executor first of all: its speed and
    its last bits follow from that."""
    return {
        "model": plan.name,
        "executor": plan.executor,
        "executor_reason": plan.executor_reason,
        "device": plan.device,
        "threads": threads,
        "dtype": plan.dtype,
        "quantization": plan.quantization_label,
        "kv_cache_mb": plan.limits.total_blocks * plan.block_bytes // (1 << 20),
        "longest_sequence": f"{plan.limits.max_sequence_tokens} tokens ({plan.sequence_reason})",
    }


async def _follow(
    settings: NodeSettings,
    hosts: Hosts,
    plan: ReplicaPlan,
    processes: WorkerProcesses,
    disk: DiskFolder | None,
    stop: StopSignal,
) -> None:
    facts = host_facts(settings, hosts, plan)
    membership = Membership(hosts.index, secrets.token_hex(8), facts, plan.limits.total_blocks, time.monotonic())
    door = connect_to_leader(settings, hosts)
    try:
        follower = Follower(hosts, settings, plan, door, membership, processes, disk)
        following = asyncio.create_task(follower.run())
        stopping = asyncio.create_task(stop.asked.wait())
        await asyncio.wait({following, stopping}, return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        ending = asyncio.create_task(follower.stop(stop.insisted))
        await asyncio.wait({following, ending}, return_when=asyncio.FIRST_COMPLETED)
        ending.cancel()
        await following
    finally:
        door.close()


async def _announce(supervisor: WorkerSupervisor) -> None:
    await supervisor.ready.wait()
    _log.info("node is ready: a first step has run")


async def _drain(
    engine: Engine,
    supervisor: WorkerSupervisor,
    supervising: asyncio.Task[None],
    stop: StopSignal,
    max_saving_seconds: float,
) -> None:
    engine.drain(max_drain_us=int(MAX_DRAIN_SECONDS * 1e6), max_saving_us=int(max_saving_seconds * 1e6))
    ends = [asyncio.create_task(event.wait()) for event in (supervisor.drained, stop.insisted)]
    # Without workers nothing ends any more: whoever gives them up ends the drain.
    await asyncio.wait({*ends, supervising}, timeout=MAX_DRAIN_SECONDS, return_when=asyncio.FIRST_COMPLETED)
    for end in ends:
        end.cancel()


def _settings(arguments: argparse.Namespace) -> NodeSettings:
    return NodeSettings(
        model=arguments.model,
        listen=arguments.listen,
        served_name=arguments.served_name,
        dtype=arguments.dtype,
        quantization=arguments.quantization,
        kv_dtype=arguments.kv_dtype,
        max_sequence_tokens=arguments.max_model_len,
        max_sequences=arguments.max_num_seqs,
        max_step_tokens=arguments.max_num_batched_tokens,
        max_step_seconds=arguments.max_step_seconds,
        step_target_milliseconds=arguments.step_target_milliseconds,
        kv_cache_bytes=arguments.kv_cache_bytes,
        kv_host_bytes=arguments.kv_host_bytes,
        replicas_here=arguments.replicas_here,
        device=arguments.device,
        executor=arguments.executor,
        first_device=arguments.first_device,
        kv_disk=arguments.kv_disk,
        kv_disk_bytes=arguments.kv_disk_bytes,
        threads=arguments.threads,
        cpus=arguments.cpus,
        spare_worker=arguments.spare_worker,
        tensor_parallel_size=arguments.tensor_parallel_size,
        pipeline_parallel_size=arguments.pipeline_parallel_size,
        fleet=arguments.fleet,
        key_file=arguments.key_file,
        allow_list=arguments.allow_list,
        max_saving_seconds=arguments.max_saving_seconds,
        max_join_seconds=arguments.max_join_seconds,
    )


def _host_flags(arguments: argparse.Namespace) -> HostFlags:
    return HostFlags(arguments.hosts, arguments.host_index, arguments.leader)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m llmscale.node",
        description="Serves one model on this host. Gateways and SDK clients connect to --listen over ZeroMQ.",
        epilog="Without keys only this machine can connect. Example: python -m llmscale.node --model tiny-chat"
        " --listen tcp://127.0.0.1:7000",
    )
    add = parser.add_argument
    add(
        "--model",
        required=True,
        help="folder, GGUF file, hub id in the local Hugging Face cache, tiny-chat or tiny-chat-mini",
    )
    add("--listen", default="tcp://127.0.0.1:7000", help="tcp://HOST:PORT or ipc://PATH (default: %(default)s)")
    add("--served-name", help="what clients call the model (default: as in --model)")
    add("--dtype", choices=DTYPES, default="auto", help="number format (default: as the checkpoint)")
    add("--quantization", choices=QUANTIZATIONS, help="make dense weights this while loading (default: leave them)")
    add(
        "--max-model-len",
        type=int,
        help="longest sequence in tokens (default: what the model allows, or what a quarter of the memory holds)",
    )
    _add_steps(parser)
    _add_cache(parser)
    add(
        "--device",
        choices=DEVICES,
        default="auto",
        help="what workers compute on (default: CUDA where torch sees a device for each, else the CPU)",
    )
    add(
        "--executor",
        choices=EXECUTORS,
        default="auto",
        help="what computes steps (default: native for one rank on the CPU that it can run, else torch)",
    )
    add(
        "--first-device", type=int, default=0, help="the device of the first rank; others follow (default: %(default)s)"
    )
    add("--threads", type=int, help="CPU threads of a worker (default: its share of the CPUs, fewer for a small model)")
    add("--cpus", type=int, help="CPUs that its workers on this host share (default: all that the node may use)")
    add(
        "-tp", "--tensor-parallel-size", type=int, default=1, help="ranks that share every layer (default: %(default)s)"
    )
    add("-pp", "--pipeline-parallel-size", type=int, default=1, help="stages of layers (default: %(default)s)")
    add(
        "--spare-worker",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="keep a spare process that has imported the executor, of which new workers are copies within milliseconds:"
        " 25 MB with the native one, 0.3 GB with torch",
    )
    add("--fleet", default="llmscale", help="only fronts of the same fleet are served (default: %(default)s)")
    add("--key-file", type=Path, help="the node's CURVE key pair; needed to listen beyond this machine")
    add("--allow-list", type=Path, help="public keys of those who may connect; belongs to --key-file")
    _add_hosts(parser)
    add("--parent", type=int, help=argparse.SUPPRESS)
    return parser


def _add_cache(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--kv-dtype", choices=KV_DTYPES, default="auto", help="what keys and values are kept as (default: as --dtype)")
    add("--kv-cache-bytes", type=int, help="memory for the KV cache (default: about 64k tokens)")
    add(
        "--kv-host-bytes",
        type=int,
        help="memory for what the KV cache evicts; 0 for none (default: four times as much)",
    )
    add(
        "--replicas-here",
        type=int,
        default=1,
        help="replicas on this host, which share what is taken of its memory unasked (default: %(default)s)",
    )
    add("--kv-disk", type=Path, help="folder for what the host has no room for; outlives nodes (default: none)")
    add("--kv-disk-bytes", type=int, help="most bytes there (default: four times the host tier)")
    add(
        "--max-saving-seconds",
        type=float,
        default=5.0,
        help="how long a drain may write what is cached to the disk; 0 for not at all (default: %(default)g)",
    )


def _add_steps(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--max-num-seqs", type=int, default=256, help="most sequences that run at once (default: %(default)s)")
    add(
        "--max-num-batched-tokens",
        type=int,
        default=512,
        help="most tokens per step; raised to --max-num-seqs where it is less (default: %(default)s)",
    )
    add(
        "--max-step-seconds",
        type=float,
        default=120.0,
        help="a worker whose step takes longer is hung and is replaced (default: %(default)g)",
    )
    add(
        "--step-target-milliseconds",
        type=float,
        default=20.0,
        help="what a prompt may add to a step that streams wait for; 0 for no bound (default: %(default)g)",
    )


def _add_hosts(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "one replica on several hosts",
        "The same command on every host. Under torchrun, LeaderWorkerSet or srun the first three are known.",
    )
    add = group.add_argument
    add("--hosts", type=int, help="hosts that share the replica's ranks (default: 1, or what the launcher says)")
    add("--host-index", type=int, help="which of them this is, from 0; host 0 serves at --listen")
    add("--leader", metavar="HOST[:PORT]", help="where the others meet host 0 (port 7070 by default)")
    add(
        "--max-join-seconds",
        type=float,
        default=120.0,
        help="how long hosts wait for each other before they give up (default: %(default)g)",
    )


if __name__ == "__main__":
    sys.exit(main())
