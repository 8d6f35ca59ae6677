"""`llmscale serve`: a gateway in this process and a node per replica beside it, for one model or for those of a file.

A model on the command line is a fleet file of one that nobody wrote, so both go the same way. Everything that can be
wrong with replicas of this host is found before anything is started, in O(headers of the checkpoints). Nodes run as
children: a dead one is started again while the gateway keeps its requests, and all end together.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from llmscale import logs
from llmscale._core import Front
from llmscale.config import MAX_REPLICAS, NodeSettings
from llmscale.errors import ConfigError, Unavailable
from llmscale.fleet_file import FleetFile, GatewayEntry, ModelEntry, read_fleet_file
from llmscale.gateway.fleet import gateway_config, serve_fleet
from llmscale.gateway.local_nodes import cpus_of_replica, device_of, local_replicas
from llmscale.models.locate import locate_model, model_name
from llmscale.node.plan import plan_replica


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """What the command line says of one model; names are those of its options."""

    model: str
    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = ()
    api_key_file: str | None = None
    served_model_name: str | None = None
    dtype: str = "auto"
    quantization: str | None = None
    kv_dtype: str = "auto"
    max_model_len: int | None = None
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 512
    step_target_milliseconds: float = 20.0
    kv_cache_bytes: int | None = None
    kv_host_bytes: int | None = None
    device: str = "auto"
    executor: str = "auto"
    kv_disk: str | None = None
    kv_disk_bytes: int | None = None
    threads: int | None = None
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    replicas: int = 1
    kill_button: bool = False
    allowed_origins: tuple[str, ...] = ()
    hedging: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.replicas <= MAX_REPLICAS:
            raise ConfigError(f"replicas is {self.replicas}, it must be from 1 to {MAX_REPLICAS} on one machine")

    def fleet(self) -> FleetFile:
        """The same as a file would say it. Raises `ModelError` when there is no such model."""
        folder = locate_model(self.model)
        entry = ModelEntry(
            model=self.model,
            replicas=self.replicas,
            dtype=self.dtype,
            quantization=self.quantization,
            kv_dtype=self.kv_dtype,
            max_model_len=self.max_model_len,
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.max_num_batched_tokens,
            step_target_milliseconds=self.step_target_milliseconds,
            kv_cache_bytes=self.kv_cache_bytes,
            kv_host_bytes=self.kv_host_bytes,
            device=self.device,
            executor=self.executor,
            kv_disk=self.kv_disk,
            kv_disk_bytes=self.kv_disk_bytes,
            threads=self.threads,
            tensor_parallel_size=self.tensor_parallel_size,
            pipeline_parallel_size=self.pipeline_parallel_size,
        )
        gateway = GatewayEntry(
            host=self.host,
            port=self.port,
            api_key_file=self.api_key_file,
            kill_button=self.kill_button,
            allowed_origins=self.allowed_origins,
            hedging=self.hedging,
        )
        return FleetFile(models={self.served_model_name or model_name(self.model, folder): entry}, gateway=gateway)


def run(options: ServeOptions) -> None:
    """Serves one model until SIGTERM or SIGINT. Raises ModelError and ConfigError before anything is started."""
    logs.configure()
    _serve(options.fleet(), options.api_keys)


def run_file(path: Path) -> None:
    """The same for the models of a fleet file."""
    logs.configure()
    _serve(read_fleet_file(path), ())


def _serve(fleet: FleetFile, api_keys: Sequence[str]) -> None:
    # Checked before folders are read, so that a wrong setting shows at once.
    gateway_config(fleet, api_keys)
    for name, entry in fleet.models.items():
        if entry.local_replicas:
            plan_replica(_node_settings(fleet, name, entry))
    needs_key = bool(api_keys) or fleet.gateway.api_key_file is not None
    serve_fleet(
        fleet, api_keys=api_keys, on_started=lambda front, port: _announce(front, fleet, port, needs_key=needs_key)
    )


def _node_settings(fleet: FleetFile, name: str, entry: ModelEntry) -> NodeSettings:
    """What a node of this host will make of its command line."""
    return NodeSettings(
        model=entry.model,
        listen="",
        served_name=name,
        dtype=entry.dtype,
        quantization=entry.quantization,
        kv_dtype=entry.kv_dtype,
        max_sequence_tokens=entry.max_model_len,
        max_sequences=entry.max_num_seqs,
        max_step_tokens=entry.max_num_batched_tokens,
        kv_cache_bytes=entry.kv_cache_bytes,
        kv_host_bytes=entry.kv_host_bytes,
        replicas_here=local_replicas(fleet),
        device=device_of(fleet, name),
        executor=entry.executor,
        first_device=fleet.first_device(name),
        kv_disk=None if entry.kv_disk is None else Path(entry.kv_disk),
        kv_disk_bytes=entry.kv_disk_bytes,
        threads=entry.threads,
        cpus=cpus_of_replica(fleet, name),
        spare_worker=entry.spare_worker,
        tensor_parallel_size=entry.tensor_parallel_size,
        pipeline_parallel_size=entry.pipeline_parallel_size,
        fleet=fleet.fleet,
        max_step_seconds=entry.max_step_seconds,
        max_saving_seconds=entry.max_saving_seconds,
        step_target_milliseconds=entry.step_target_milliseconds,
    )


def _announce(front: Front, fleet: FleetFile, port: int, *, needs_key: bool) -> None:
    """Prints where to go, and then, from a thread, when every model is ready."""
    host = fleet.gateway.host
    base = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    names = list(fleet.models)
    verb = "loads" if fleet.local_workers else "looks for"
    sys.stdout.write(f"llmscale listens on {base}/v1 and {verb} {', '.join(names)} ...\n")
    sys.stdout.flush()
    announce = partial(_announce_ready, front, names, base, needs_key=needs_key)
    threading.Thread(target=announce, name="announce", daemon=True).start()


def _announce_ready(front: Front, names: Sequence[str], base: str, *, needs_key: bool) -> None:
    from llmscale.gateway.replicas import model_states

    began = time.monotonic()
    try:
        while set(model_states(names, front.status().replicas).values()) != {"ready"}:
            time.sleep(0.02)
    except Unavailable:
        # The command was ended before that: the front is closed, and there is nothing to announce.
        return
    # The key itself is not for a terminal or a log.
    key = " -H 'authorization: Bearer YOUR-KEY'" if needs_key else ""
    body = f'{{"model": "{names[0]}", "messages": [{{"role": "user", "content": "What is 23 + 45?"}}]}}'
    sys.stdout.write(
        f"ready after {time.monotonic() - began:.1f} s\n\n"
        f"  chat page   {base}/\n"
        f"  try         curl {base}/v1/chat/completions -H 'content-type: application/json'{key} -d '{body}'\n\n"
    )
    sys.stdout.flush()
