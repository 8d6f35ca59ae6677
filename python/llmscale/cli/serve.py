"""`llmscale serve`: a gateway in this process, a node per replica beside it, one command.

Nodes run as children, so that a dead node is started again while the gateway keeps its requests; all end together.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import structlog

from llmscale import logs
from llmscale._core import Front, Sampling
from llmscale.config import NodeSettings
from llmscale.errors import ConfigError
from llmscale.gateway.config import GatewayConfig, ServedModel
from llmscale.gateway.serve import run as run_gateway
from llmscale.node.plan import ReplicaPlan, plan_replica
from llmscale.tokenizer import Tokenizer

_log = structlog.get_logger("llmscale.serve")

FIRST_BACKOFF_SECONDS = 0.2
MAX_BACKOFF_SECONDS = 30.0
# A node that has lived this long is not in a loop of deaths, and is started again without a pause.
STEADY_SECONDS = 10.0
STOP_SECONDS = 35.0
MAX_REPLICAS = 64


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """What the command line says; names are those of its options."""

    model: str
    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = ()
    api_key_file: str | None = None
    served_model_name: str | None = None
    dtype: str = "auto"
    max_model_len: int | None = None
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 512
    kv_cache_bytes: int | None = None
    threads: int | None = None
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    replicas: int = 1
    kill_button: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.replicas <= MAX_REPLICAS:
            raise ConfigError(f"replicas is {self.replicas}, it must be from 1 to {MAX_REPLICAS} on one machine")

    @property
    def threads_per_worker(self) -> int | None:
        """What was asked for, or each replica's share of the CPUs; None lets a single replica decide."""
        if self.threads is not None or self.replicas == 1:
            return self.threads
        workers = self.replicas * self.tensor_parallel_size * self.pipeline_parallel_size
        return max(1, len(os.sched_getaffinity(0)) // max(1, workers))

    def node_settings(self, listen: str) -> NodeSettings:
        """The node's part."""
        return NodeSettings(
            model=self.model,
            listen=listen,
            served_name=self.served_model_name,
            dtype=self.dtype,
            max_sequence_tokens=self.max_model_len,
            max_sequences=self.max_num_seqs,
            max_step_tokens=self.max_num_batched_tokens,
            kv_cache_bytes=self.kv_cache_bytes,
            threads=self.threads_per_worker,
            tensor_parallel_size=self.tensor_parallel_size,
            pipeline_parallel_size=self.pipeline_parallel_size,
        )

    def node_arguments(self, listen: str) -> list[str]:
        """The node's command line."""
        named = {
            "--model": self.model,
            "--listen": listen,
            "--served-name": self.served_model_name,
            "--dtype": self.dtype,
            "--max-model-len": self.max_model_len,
            "--max-num-seqs": self.max_num_seqs,
            "--max-num-batched-tokens": self.max_num_batched_tokens,
            "--kv-cache-bytes": self.kv_cache_bytes,
            "--threads": self.threads_per_worker,
            "--tensor-parallel-size": self.tensor_parallel_size,
            "--pipeline-parallel-size": self.pipeline_parallel_size,
            "--parent": os.getpid(),
        }
        given = [(name, str(value)) for name, value in named.items() if value is not None]
        return [sys.executable, "-m", "llmscale.node", *(word for pair in given for word in pair)]


def run(options: ServeOptions) -> None:
    """Serves until SIGTERM or SIGINT. Raises ModelError and ConfigError before anything is started."""
    logs.configure()
    config = GatewayConfig(
        host=options.host,
        port=options.port,
        api_keys=options.api_keys,
        api_key_file=None if options.api_key_file is None else Path(options.api_key_file),
        kill_button=options.kill_button,
    )
    with tempfile.TemporaryDirectory(prefix="llmscale-serve-") as folder:
        addresses = [f"ipc://{folder}/node-{number}" for number in range(options.replicas)]
        plan = plan_replica(options.node_settings(addresses[0]))
        tokenizer = Tokenizer(plan.folder, vocabulary=plan.limits.vocabulary)
        model = ServedModel(
            name=plan.name,
            tokenizer=tokenizer,
            vocabulary=plan.limits.vocabulary,
            max_sequence_tokens=plan.limits.max_sequence_tokens,
            created=int(time.time()),
        )
        front = Front(addresses)
        keepers = [NodeKeeper(options.node_arguments(address)) for address in addresses]
        for keeper in keepers:
            keeper.start()
        try:
            run_gateway(config, front, Sampling, [model], on_started=lambda port: _announce(front, plan, config, port))
        finally:
            for keeper in keepers:
                keeper.ask_to_stop()
            for keeper in keepers:
                keeper.stop()


class NodeKeeper:
    """Keeps the node process alive from a thread of its own.

    The node asks the kernel to end it with the thread that started it, so every start happens in this one thread, which
    lives as long as the command.
    """

    def __init__(self, command: list[str]) -> None:
        self._command = command
        self._stopping = threading.Event()
        self._process: subprocess.Popen[bytes] | None = None
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="node-keeper", daemon=True)

    def start(self) -> None:
        """Starts the node."""
        self._thread.start()
        self._started.wait()

    def ask_to_stop(self) -> None:
        """Lets the node drain."""
        self._stopping.set()
        process = self._process
        if process is not None and process.poll() is None:
            process.terminate()

    def stop(self) -> None:
        """Ends the node: it drains, then it must go."""
        self.ask_to_stop()
        process = self._process
        if process is not None:
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
        self._thread.join()

    def _keep(self) -> None:
        backoff = FIRST_BACKOFF_SECONDS
        while not self._stopping.is_set():
            began = time.monotonic()
            self._process = subprocess.Popen(self._command)  # noqa: S603  # our own interpreter and module
            self._started.set()
            code = self._process.wait()
            # A node ends with 0 when it is told to, mostly by a signal to the whole group; this process hears it too.
            if self._stopping.wait(1.0 if code == 0 else 0.0):
                return
            if time.monotonic() - began > STEADY_SECONDS:
                backoff = FIRST_BACKOFF_SECONDS
            _log.warning("node ended, starting it again", code=code, in_seconds=backoff)
            self._stopping.wait(backoff)
            backoff = min(2 * backoff, MAX_BACKOFF_SECONDS)


def _announce(front: Front, plan: ReplicaPlan, config: GatewayConfig, port: int) -> None:
    """Prints where to go, and then, from a thread, when the model is ready."""
    host = f"[{config.host}]" if ":" in config.host else config.host
    base = f"http://{host}:{port}"
    sys.stdout.write(f"llmscale listens on {base}/v1 and loads {plan.name} ...\n")
    sys.stdout.flush()
    threading.Thread(target=_announce_ready, args=(front, plan, base), name="announce", daemon=True).start()


def _announce_ready(front: Front, plan: ReplicaPlan, base: str) -> None:
    began = time.monotonic()
    while not any(replica.state == "ready" for replica in front.status().replicas):
        time.sleep(0.02)
    body = f'{{"model": "{plan.name}", "messages": [{{"role": "user", "content": "What is 23 + 45?"}}]}}'
    sys.stdout.write(
        f"ready after {time.monotonic() - began:.1f} s\n\n"
        f"  chat page   {base}/\n"
        f"  try         curl {base}/v1/chat/completions -H 'content-type: application/json' -d '{body}'\n\n"
    )
    sys.stdout.flush()
