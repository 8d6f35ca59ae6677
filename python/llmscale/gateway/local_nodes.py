"""The nodes that a gateway starts on its own host: their command lines, and that they are started again when they end.

One `NodeKeeper` per replica holds a process and a thread, whose only work is to wait. A node is a command to it: it
loads nothing of a node's code and knows no model, request or socket.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final
from urllib.parse import quote

from llmscale import machine
from llmscale.devices.registry import choose
from llmscale.fleet_file import FleetFile
from llmscale.logs import get_logger

_log = get_logger("llmscale.serve")

FIRST_BACKOFF_SECONDS: Final = 0.2
MAX_BACKOFF_SECONDS: Final = 30.0
# A node that has lived this long is not in a loop of deaths, and is started again without a pause.
STEADY_SECONDS: Final = 10.0
STOP_SECONDS: Final = 35.0
# Neither SIGTERM nor SIGINT: a node may have had one already, with the whole group, and the second insists.
ASKING: Final = signal.SIGUSR1


@dataclass(frozen=True, slots=True)
class LocalNode:
    """One replica of this host: what it serves, where the front finds it, and how it is started."""

    model: str
    address: str
    command: tuple[str, ...]


def cpus_of_replica(fleet: FleetFile, model: str) -> int:
    """The shares of a replica's workers; all workers of this host have the same. How many threads these CPUs are worth
    is the node's to say, which knows the weights."""
    entry = fleet.models[model]
    workers = entry.tensor_parallel_size * entry.pipeline_parallel_size
    return workers * max(1, machine.cpus() // fleet.local_workers)


def local_replicas(fleet: FleetFile) -> int:
    """Of all models, on this host."""
    return sum(entry.local_replicas for entry in fleet.models.values())


def device_of(fleet: FleetFile, model: str) -> str:
    """What was asked for; "auto" is the same for all replicas of this host, whose tokens would differ otherwise."""
    asked = fleet.models[model].device
    return choose(asked, fleet.device_workers) if asked == "auto" else asked


def local_nodes(fleet: FleetFile, folder: str) -> list[LocalNode]:
    """The nodes of this host; `folder` is for their sockets."""
    found: list[LocalNode] = []
    for model, entry in fleet.models.items():
        for replica in range(entry.local_replicas):
            address = f"ipc://{folder}/node-{len(found)}"
            first_device = fleet.first_device(model, replica)
            found.append(LocalNode(model, address, _command(fleet, model, address, replica, first_device)))
    return found


def _command(fleet: FleetFile, model: str, address: str, replica: int, first_device: int) -> tuple[str, ...]:
    entry = fleet.models[model]
    keys = fleet.keys
    named = {
        "--model": entry.model,
        "--listen": address,
        "--served-name": model,
        "--dtype": entry.dtype,
        "--quantization": entry.quantization,
        "--kv-dtype": entry.kv_dtype,
        "--max-model-len": entry.max_model_len,
        "--max-num-seqs": entry.max_num_seqs,
        "--max-num-batched-tokens": entry.max_num_batched_tokens,
        "--max-step-seconds": entry.max_step_seconds,
        "--step-target-milliseconds": entry.step_target_milliseconds,
        "--kv-cache-bytes": entry.kv_cache_bytes,
        "--kv-host-bytes": entry.kv_host_bytes,
        "--replicas-here": local_replicas(fleet),
        "--device": device_of(fleet, model),
        "--first-device": first_device,
        "--executor": entry.executor,
        # A folder is of one node at a time. A replica that is started again finds its own.
        "--kv-disk": None if entry.kv_disk is None else f"{entry.kv_disk}/{quote(model, safe='')}-{replica}",
        "--kv-disk-bytes": entry.kv_disk_bytes,
        "--max-saving-seconds": entry.max_saving_seconds,
        "--threads": entry.threads,
        "--cpus": cpus_of_replica(fleet, model),
        "--tensor-parallel-size": entry.tensor_parallel_size,
        "--pipeline-parallel-size": entry.pipeline_parallel_size,
        "--fleet": fleet.fleet,
        # A launcher's variables would make it one of several hosts; these are of this host alone.
        "--hosts": 1,
        # The front knows all nodes by one public key, those of this host too.
        "--key-file": None if keys is None else keys.node_pair,
        "--allow-list": None if keys is None else keys.allow_list,
        "--parent": os.getpid(),
    }
    # With "=", so that a value that begins with a dash is not taken for an option.
    words = [f"{name}={value}" for name, value in named.items() if value is not None]
    if not entry.spare_worker:
        words.append("--no-spare-worker")
    return (sys.executable, "-m", "llmscale.node", *words)


class NodeKeeper:
    """Keeps the node process alive from a thread of its own.

    The node asks the kernel to end it with the thread that started it, so every start happens in this one thread, which
    lives as long as the command.
    """

    def __init__(self, node: LocalNode) -> None:
        self._node = node
        self._stopping = threading.Event()
        self._process: subprocess.Popen[bytes] | None = None
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="node-keeper", daemon=True)

    def start(self) -> None:
        """Starts the node, or has at least tried: it is tried again until `stop`. Whoever is interrupted in here still
        has to call `stop`."""
        self._thread.start()
        self._started.wait()

    def ask_to_stop(self) -> None:
        """Lets the node drain. It is asked once: a second signal would end it before it has saved its cache."""
        if self._stopping.is_set():
            return
        self._stopping.set()
        process = self._process
        if process is not None:
            process.send_signal(ASKING)

    def stop(self) -> None:
        """Ends the node: it drains, then it must go."""
        self.ask_to_stop()
        process = self._process
        if process is not None:
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
        if self._thread.is_alive():
            self._thread.join()

    def _keep(self) -> None:
        backoff = FIRST_BACKOFF_SECONDS
        while not self._stopping.is_set():
            began = time.monotonic()
            try:
                code = self._run()
            except OSError as error:
                # No memory or no process left on this host, for now.
                why = str(error)
                _log.warning(
                    "node cannot be started, trying again", model=self._node.model, why=why, in_seconds=backoff
                )
            else:
                # A node ends with 0 when it is told to, mostly by a signal to the whole group; this process hears it
                # too.
                if self._stopping.wait(1.0 if code == 0 else 0.0):
                    return
                if time.monotonic() - began > STEADY_SECONDS:
                    backoff = FIRST_BACKOFF_SECONDS
                _log.warning("node ended, starting it again", model=self._node.model, code=code, in_seconds=backoff)
            self._stopping.wait(backoff)
            backoff = min(2 * backoff, MAX_BACKOFF_SECONDS)

    def _run(self) -> int:
        """The exit code of one life of the node."""
        try:
            self._process = subprocess.Popen(self._node.command)  # noqa: S603  # our own interpreter and module
        finally:
            self._started.set()
        if self._stopping.is_set():
            # Whoever asked has seen the process before this one.
            self._process.send_signal(ASKING)
        return self._process.wait()


@contextmanager
def kept(nodes: Sequence[LocalNode]) -> Iterator[None]:
    """The nodes run while the block does; afterwards all drain at once, and are gone."""
    keepers: list[NodeKeeper] = []
    try:
        for node in nodes:
            keepers.append(NodeKeeper(node))
            keepers[-1].start()
        yield
    finally:
        for keeper in keepers:
            keeper.ask_to_stop()
        for keeper in keepers:
            keeper.stop()
