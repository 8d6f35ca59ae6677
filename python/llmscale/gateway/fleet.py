"""From a fleet to its gateway: the nodes of this host started, those elsewhere connected, one front before all of them.

`serve_fleet` is what every command that serves ends in; a single model is a fleet of one. It costs a process per
replica and reads each model's tokenizer once. Knows nothing of HTTP, and of a model only what its folder's
`config.json` says.
"""

from __future__ import annotations

import signal
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path

import msgspec

from llmscale._core import Front, Sampling
from llmscale.collector import paused_collector
from llmscale.config import check_name
from llmscale.errors import ConfigError
from llmscale.fleet_file import FleetFile, KeysEntry
from llmscale.gateway.auth import load_keys
from llmscale.gateway.config import GatewayConfig, GatewayLimits
from llmscale.gateway.listener import listen
from llmscale.gateway.local_nodes import kept, local_nodes

# A public key is 40 characters.
_MAX_KEY_BYTES = 1_024


def gateway_config(fleet: FleetFile, api_keys: Sequence[str] = ()) -> GatewayConfig:
    """The gateway's part. Raises `ConfigError`."""
    entry = fleet.gateway
    limits = {name: value for name, value in msgspec.structs.asdict(entry.limits).items() if value is not None}
    return GatewayConfig(
        host=entry.host,
        port=entry.port,
        api_keys=tuple(api_keys),
        api_key_file=None if entry.api_key_file is None else Path(entry.api_key_file),
        limits=GatewayLimits(**limits),
        kill_button=entry.kill_button,
        allowed_origins=entry.allowed_origins,
    )


def serve_fleet(
    fleet: FleetFile, *, api_keys: Sequence[str] = (), on_started: Callable[[Front, int], None] | None = None
) -> None:
    """Serves until SIGTERM or SIGINT. `on_started` is called with the front and the port once connections are accepted.

    Raises `ConfigError` for what is wrong in the file or in that of API keys before any node is started. Nodes start
    while this process still imports and reads what a gateway needs, which takes both as long: where a tokenizer cannot
    be read, they end again, and `ModelError` is raised.
    """
    config = gateway_config(fleet, api_keys)
    check_name("fleet", fleet.fleet)
    keys = load_keys(config.api_keys, config.api_key_file)
    has_local_nodes = any(entry.local_replicas for entry in fleet.models.values())
    key_file, node_key = _front_keys(fleet.keys, has_local_nodes=has_local_nodes)
    with _unwound_by_sigterm(), tempfile.TemporaryDirectory(prefix="llmscale-serve-") as folder:
        nodes = local_nodes(fleet, folder)
        addresses = [node.address for node in nodes]
        addresses += [address for entry in fleet.models.values() for address in entry.nodes]
        front = Front(
            addresses,
            fleet=fleet.fleet,
            max_node_silence_us=int(fleet.gateway.max_node_silence_seconds * 1e6),
            ejection_us=int(fleet.gateway.ejection_seconds * 1e6),
            hedging=fleet.gateway.hedging,
            key_file=key_file,
            node_key=node_key,
        )
        with closing(listen(config)) as listener, kept(nodes):
            with paused_collector():
                from llmscale.gateway.serve import run
                from llmscale.gateway.served_model import load_model

                models = [load_model(name, entry) for name, entry in fleet.models.items()]
            started = None if on_started is None else partial(on_started, front)
            run(config, front, Sampling, models, keys, listener=listener, on_started=started)


@contextmanager
def _unwound_by_sigterm() -> Iterator[None]:
    """Nodes are ended and their folder is removed, also where SIGTERM comes before the server listens for it, or once
    more while nodes drain; then they are not waited for."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(_number: int, _frame: object) -> None:
        raise SystemExit(0)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _front_keys(keys: KeysEntry | None, *, has_local_nodes: bool) -> tuple[str | None, str | None]:
    """The file of the gateway's pair and the nodes' public key. Raises `ConfigError` for a file that is not there."""
    if keys is None:
        return None, None
    needed = [keys.pair, keys.node_public]
    if has_local_nodes:
        # Nodes of this host listen where only this machine is, but the front trusts one key for all nodes.
        needed += [keys.node_pair, keys.allow_list]
    for path in needed:
        if not path.is_file():
            raise ConfigError(
                f"there is no key file {path}; make it with `llmscale keys {keys.folder} node gateway:{keys.gateway}`,"
                " or copy it from where that was done"
            )
    try:
        with keys.node_public.open("rb") as file:
            return str(keys.pair), file.read(_MAX_KEY_BYTES).decode("ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the key file {keys.node_public} cannot be read: {error}") from error
