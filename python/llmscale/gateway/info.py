"""Everything that is not generation: models, health, the fleet's state, metrics, the OpenAPI document and the chat
page.

Each answer is O(its size); the page's files are read once when the process starts, so no request names a file. Knows
nothing of prompts or of tokens.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Final

import msgspec

from llmscale.errors import NotFound, Unavailable
from llmscale.gateway.config import ServedModel
from llmscale.gateway.http import Exchange
from llmscale.gateway.openai import ModelList, ModelObject
from llmscale.gateway.openapi import document
from llmscale.gateway.replicas import SERVING, fleet_state, model_states
from llmscale.gateway.services import Services
from llmscale.logs import get_logger

_log = get_logger("llmscale.gateway")
_json = msgspec.json.Encoder()
_KINDS: Final = {
    ".html": b"text/html; charset=utf-8",
    ".js": b"text/javascript; charset=utf-8",
    ".css": b"text/css; charset=utf-8",
    ".svg": b"image/svg+xml",
}
_PAGE_HEADERS: Final = (
    (b"content-security-policy", b"default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-cache"),
)


def _load_page() -> dict[str, tuple[bytes, bytes]]:
    folder = Path(__file__).parent / "page"
    return {
        path.name: (_KINDS[path.suffix], path.read_bytes())
        for path in sorted(folder.iterdir())
        if path.suffix in _KINDS
    }


_page: Final = _load_page()


class ReplicaHealth(msgspec.Struct, frozen=True):
    """One replica in /fleet."""

    node: str
    model: str
    state: str
    trust: str
    """"trusted", "ejected" while this gateway leaves it alone, "probing" while one request decides."""
    ejections: int
    recent_answers: int
    """First tokens of the last 5 to 10 seconds, then the late ones of them, then attempts that it failed."""
    recent_late: int
    recent_failures: int
    running: int
    waiting: int
    free_blocks: int
    total_blocks: int
    steps: int
    numerics: str
    """How it computes, with the executor first: kernels, number format, ranks. Empty until its worker has told."""
    worker_pid: int
    worker_restarts: int
    preemptions: int


class ModelHealth(msgspec.Struct, frozen=True):
    """One model in /fleet: the best state of its replicas."""

    name: str
    state: str


class AttemptCounts(msgspec.Struct, frozen=True):
    """What this gateway's front did about replicas that die, fail or are late, since it started."""

    lost_attempts: int
    moved_attempts: int
    ejections: int
    failed_probes: int
    spared_replicas: int
    retries: int
    repeated_retries: int
    retries_delayed: int
    hedges: int
    hedge_wins: int
    hedged_tokens: int
    first_attempt_tokens: int


class Fleet(msgspec.Struct, frozen=True):
    """Response of /fleet: what the chat page shows of the machines behind it."""

    state: str
    queued_requests: int
    live_requests: int
    may_kill: bool
    models: list[ModelHealth]
    replicas: list[ReplicaHealth]
    attempts: AttemptCounts


def _model_object(model: ServedModel) -> ModelObject:
    return ModelObject(model.name, "model", model.created, "llmscale", model.name, None, model.max_sequence_tokens)


async def models(services: Services, exchange: Exchange, _tenant: str) -> None:
    """GET /v1/models."""
    listed = [_model_object(entry) for entry in services.models.values()]
    await exchange.respond(_json.encode(ModelList("list", listed)))


async def model(services: Services, exchange: Exchange, _tenant: str) -> None:
    """GET /v1/models/{id}."""
    await exchange.respond(_json.encode(_model_object(services.model(exchange.part))))


async def fleet(services: Services, exchange: Exchange, _tenant: str) -> None:
    """GET /fleet."""
    status = services.front.status()
    states = model_states(services.models, status.replicas)
    answer = Fleet(
        "draining" if services.draining else fleet_state(states),
        status.queued_requests,
        status.live_requests,
        services.config.kill_button,
        [ModelHealth(name, state) for name, state in states.items()],
        [msgspec.convert(replica, ReplicaHealth, from_attributes=True) for replica in status.replicas],
        msgspec.convert(status, AttemptCounts, from_attributes=True),
    )
    await exchange.respond(_json.encode(answer), headers=((b"cache-control", b"no-store"),))


async def kill_worker(services: Services, exchange: Exchange, _tenant: str) -> None:
    """POST /fleet/kill/{pid}: SIGKILL for a worker of this machine, where the operator has asked for the button."""
    if not services.config.kill_button:
        raise NotFound("this gateway has no button that kills workers; llmscale serve --kill-button has one")
    # Only what the fleet names as a worker now: a number from a request is not otherwise believed.
    pid = next((one.worker_pid for one in services.front.status().replicas if str(one.worker_pid) == exchange.part), 0)
    if pid == 0:
        raise NotFound(f"no worker has the process id {exchange.part}; GET /fleet lists them")
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError as error:
        raise NotFound(f"the worker with the process id {pid} is dead already") from error
    _log.warning("a worker was killed by the page's button", pid=pid)
    await exchange.respond(b'{"status":"killed"}')


async def metrics(services: Services, exchange: Exchange, _tenant: str) -> None:
    """GET /metrics."""
    await exchange.respond(services.metrics.exposition(), kind=b"text/plain; version=0.0.4; charset=utf-8")


async def openapi(_services: Services, exchange: Exchange, _tenant: str) -> None:
    """GET /openapi.json."""
    await exchange.respond(document())


async def live(_services: Services, exchange: Exchange, _tenant: str) -> None:
    """GET /health/live: the event loop answers."""
    await exchange.respond(b'{"status":"live"}')


async def ready(services: Services, exchange: Exchange, _tenant: str) -> None:
    """GET /health/ready, and /health as other servers have it: a request for any model sent now would be computed."""
    if services.draining:
        raise Unavailable("not ready: draining")
    states = model_states(services.models, services.front.status().replicas)
    lacking = [f"{name} ({state})" for name, state in states.items() if state not in SERVING]
    if lacking:
        raise Unavailable(f"not ready: no replica of {', '.join(lacking)} is ready")
    await exchange.respond(_json.encode({"status": fleet_state(states)}))


async def chat_page(_services: Services, exchange: Exchange, _tenant: str) -> None:
    """GET /: the chat page."""
    await _send_file(exchange, "index.html")


async def page_file(_services: Services, exchange: Exchange, _tenant: str) -> None:
    """GET /page/{file}."""
    await _send_file(exchange, exchange.part)


async def _send_file(exchange: Exchange, name: str) -> None:
    entry = _page.get(name)
    if entry is None:
        raise NotFound("the page has no such file")
    await exchange.respond(entry[1], kind=entry[0], headers=_PAGE_HEADERS)
