"""`python -m llmscale.gateway --nodes tcp://... --model tiny-chat`: one gateway in front of running nodes.

Waits until a node has told what it serves, loads that model's tokenizer from its folder, then listens until SIGTERM or
SIGINT. With `--fleet-file` a file says everything, this host's replicas are started, and nothing is waited for. SIGTERM
drains: no new requests, running streams finish within a bound or end with an error that says to retry.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from llmscale import logs
from llmscale._core import Front, ReplicaStatus, Sampling
from llmscale.config import (
    LEAST_EJECTION_SECONDS,
    LEAST_NODE_SILENCE_SECONDS,
    MOST_EJECTION_SECONDS,
    MOST_NODE_SILENCE_SECONDS,
    USUAL_EJECTION_SECONDS,
    USUAL_NODE_SILENCE_SECONDS,
    check_name,
)
from llmscale.errors import ConfigError, LlmscaleError
from llmscale.fleet_file import read_fleet_file
from llmscale.gateway.auth import load_keys
from llmscale.gateway.config import GatewayConfig, GatewayLimits, ServedModel
from llmscale.gateway.fleet import serve_fleet
from llmscale.gateway.serve import run
from llmscale.logs import get_logger
from llmscale.models.fingerprint import tokenizer_digest
from llmscale.models.locate import locate_model, model_name
from llmscale.tokenizer import Tokenizer

_log = get_logger("llmscale.gateway")
_POLL_SECONDS = 0.05


def main(words: Sequence[str] | None = None) -> int:
    """Parses the command line and serves."""
    file = _fleet_file(words)
    serve = partial(_serve, _parser().parse_args(words)) if file is None else partial(_serve_file, file)
    logs.configure()
    try:
        serve()
    except (LlmscaleError, OSError) as error:
        _log.error("the gateway ends", reason=str(error))
        return 1
    return 0


def _fleet_file(words: Sequence[str] | None) -> Path | None:
    """The file, if one is named. Nothing else may be beside it: what would hold then?"""
    parser = argparse.ArgumentParser(prog="python -m llmscale.gateway", add_help=False, allow_abbrev=False)
    parser.add_argument("--fleet-file", type=Path)
    known, others = parser.parse_known_args(words)
    file: Path | None = known.fleet_file
    if file is not None and others and not {"-h", "--help"}.intersection(others):
        parser.error(f"--fleet-file stands alone, write into the file what {' '.join(others)} says")
    return None if {"-h", "--help"}.intersection(others) else file


def _serve_file(file: Path) -> None:
    fleet = read_fleet_file(file)
    names = list(fleet.models)
    serve_fleet(fleet, on_started=lambda _front, port: _announce(fleet.gateway.host, port, names))


def _serve(arguments: argparse.Namespace) -> None:
    limits = replace(
        GatewayLimits(),
        max_body_bytes=arguments.max_body_bytes,
        max_connections=arguments.max_connections,
        max_request_seconds=arguments.max_request_seconds,
        max_drain_seconds=arguments.max_drain_seconds,
    )
    # Checked before a node is asked, so that a wrong setting shows at once.
    config = GatewayConfig(
        host=arguments.host,
        port=arguments.port,
        api_keys=tuple(arguments.api_key),
        api_key_file=arguments.api_key_file,
        limits=limits,
        allowed_origins=tuple(arguments.allowed_origins),
    )
    keys = load_keys(config.api_keys, config.api_key_file)
    check_name("fleet (--fleet)", arguments.fleet)
    folders = dict(_named(model) for model in arguments.model)
    front = Front(
        arguments.nodes,
        fleet=arguments.fleet,
        max_node_silence_us=int(arguments.max_node_silence_seconds * 1e6),
        ejection_us=int(arguments.ejection_seconds * 1e6),
        hedging=arguments.hedging,
        key_file=_text(arguments.key_file),
        node_key=arguments.node_key,
    )
    replicas = _wait_for(front, list(folders), arguments.max_wait_seconds)
    models = [_load(name, folder, replicas[name]) for name, folder in folders.items()]
    run(config, front, Sampling, models, keys, on_started=lambda port: _announce(config.host, port, list(folders)))


def _named(model: str) -> tuple[str, Path]:
    """`NAME=FOLDER`, or a model that is called what it is called on its node."""
    name, separator, place = model.partition("=")
    if separator:
        return name, locate_model(place)
    folder = locate_model(model)
    return model_name(model, folder), folder


def _wait_for(front: Front, names: Sequence[str], max_seconds: float) -> dict[str, ReplicaStatus]:
    """One replica of each model, as soon as there is one. Raises `ConfigError` when one does not appear in time."""
    deadline = time.monotonic() + max_seconds
    while True:
        known = {replica.model: replica for replica in front.status().replicas if replica.max_sequence_tokens > 0}
        missing = [name for name in names if name not in known]
        if not missing:
            return known
        if time.monotonic() > deadline:
            raise ConfigError(
                f"no node serves {', '.join(missing)} after {max_seconds:g} s; nodes serve"
                f" {', '.join(sorted(known)) or 'nothing yet'}; check --nodes and --model"
            )
        time.sleep(_POLL_SECONDS)


def _load(name: str, folder: Path, replica: ReplicaStatus) -> ServedModel:
    return ServedModel(
        name=name,
        tokenizer=Tokenizer(folder, vocabulary=replica.vocabulary),
        vocabulary=replica.vocabulary,
        max_sequence_tokens=replica.max_sequence_tokens,
        created=int(time.time()),
        tokenizer_digest=tokenizer_digest(folder).hex(),
    )


def _announce(host: str, port: int, names: Sequence[str]) -> None:
    _log.info("gateway listens", address=f"http://{host}:{port}", models=", ".join(names))


def _silence(text: str) -> float:
    seconds = float(text)
    if not LEAST_NODE_SILENCE_SECONDS <= seconds <= MOST_NODE_SILENCE_SECONDS:
        raise argparse.ArgumentTypeError(
            f"{seconds:g} s of silence: it must be from {LEAST_NODE_SILENCE_SECONDS:g}, four reports of a node,"
            f" to {MOST_NODE_SILENCE_SECONDS:g}"
        )
    return seconds


def _ejection(text: str) -> float:
    seconds = float(text)
    if not LEAST_EJECTION_SECONDS <= seconds <= MOST_EJECTION_SECONDS:
        raise argparse.ArgumentTypeError(
            f"{seconds:g} s without work: it must be from {LEAST_EJECTION_SECONDS:g} to {MOST_EJECTION_SECONDS:g}"
        )
    return seconds


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)


def _parser() -> argparse.ArgumentParser:
    defaults = GatewayLimits()
    parser = argparse.ArgumentParser(
        prog="python -m llmscale.gateway",
        description="Serves OpenAI's HTTP API and the chat page in front of running nodes.",
        epilog="Without API keys only this machine can connect. Example: python -m llmscale.gateway"
        " --nodes tcp://127.0.0.1:7000 --model tiny-chat --port 8000",
    )
    add = parser.add_argument
    add("--fleet-file", type=Path, metavar="FILE", help="llmscale.toml instead of all other options")
    add("--nodes", nargs="+", required=True, metavar="ADDRESS", help="nodes: tcp://HOST:PORT or ipc://PATH")
    add(
        "--model",
        action="append",
        required=True,
        metavar="[NAME=]MODEL",
        help="folder, GGUF file, hub id in the local cache, tiny-chat or tiny-chat-mini; NAME= when the nodes call it"
        " otherwise; may be repeated",
    )
    _add_client_options(parser)
    add("--fleet", default="llmscale", help="name of the fleet, as on its nodes (default: %(default)s)")
    add("--key-file", type=Path, help="this gateway's CURVE key pair, for nodes beyond this machine")
    add("--node-key", help="the nodes' public CURVE key; belongs to --key-file")
    add("--max-wait-seconds", type=float, default=60.0, help="wait for the first node (default: %(default)g)")
    add(
        "--max-node-silence-seconds",
        type=_silence,
        default=USUAL_NODE_SILENCE_SECONDS,
        help="a node that says nothing for this long is lost; nodes report every 0.25 s (default: %(default)g)",
    )
    add(
        "--ejection-seconds",
        type=_ejection,
        default=USUAL_EJECTION_SECONDS,
        help="a replica that answers badly gets nothing for this long, doubled each time up to a minute"
        " (default: %(default)g)",
    )
    add(
        "--hedging",
        action="store_true",
        help="try a request at a second replica when its first token is later than 95 of 100: shortens the slowest"
        " waits where single replicas stall, costs at most a twentieth more prompt tokens (default: off)",
    )
    add("--max-body-bytes", type=int, default=defaults.max_body_bytes, help="largest body (default: %(default)s)")
    add("--max-connections", type=int, default=defaults.max_connections, help="most connections (default: %(default)s)")
    add(
        "--max-request-seconds",
        type=float,
        default=defaults.max_request_seconds,
        help="longest time for a request (default: %(default)g)",
    )
    add(
        "--max-drain-seconds",
        type=float,
        default=defaults.max_drain_seconds,
        help="longest time for streams to finish after SIGTERM (default: %(default)g)",
    )
    return parser


def _add_client_options(parser: argparse.ArgumentParser) -> None:
    """Where clients connect, and who they may be."""
    add = parser.add_argument
    add("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    add("--port", type=int, default=8000, help="port to listen on, 0 for any (default: %(default)s)")
    add(
        "--api-key",
        action="append",
        default=[],
        help="a key that clients must send; visible to other users of this host",
    )
    add("--api-key-file", type=Path, help="file with one 'TENANT SHA256-OF-KEY' per line")
    add(
        "--allowed-origins",
        action="extend",
        nargs="+",
        default=[],
        metavar="ORIGIN",
        help="origins of web pages that may ask, with a key, as https://app.example; * for all (default: none)",
    )


if __name__ == "__main__":
    sys.exit(main())
