"""Runs a gateway: the server, its bounds, and its orderly end.

On SIGTERM or SIGINT it stops listening, says "draining" at /health/ready, lets streams finish within a bound and then
ends the rest with an error that tells the client to retry. Knows nothing of requests.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import signal
import socket
import threading
from collections.abc import Callable, Generator, Sequence
from typing import Final

import uvicorn

from llmscale.errors import Unavailable
from llmscale.gateway.app import Gateway
from llmscale.gateway.auth import ApiKeys
from llmscale.gateway.config import GatewayConfig, ServedModel
from llmscale.gateway.cross_origin import for_pages_of
from llmscale.gateway.front import Front, SamplingFactory
from llmscale.gateway.listener import listen
from llmscale.gateway.protocol import GuardedProtocol
from llmscale.logs import get_logger

_log = get_logger("llmscale.gateway")
_BACKLOG: Final = 2_048
# After the streams were ended with an error, their last bytes need a moment to leave.
_LAST_WORDS_SECONDS: Final = 2


class _Server(uvicorn.Server):
    """uvicorn's server, which tells the gateway when it begins to end."""

    def __init__(self, config: uvicorn.Config, gateway: Gateway, on_started: Callable[[], None] | None) -> None:
        super().__init__(config)
        self._gateway = gateway
        self._on_started = on_started

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self._on_started is not None and not self.should_exit:
            self._on_started()

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """As uvicorn's, but an orderly end is an end: the signal is not raised again, so the exit code is 0."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._gateway.services.drain(Unavailable("this gateway is shutting down; retry on another one or in a moment"))
        await super().shutdown(sockets)


def make_server(gateway: Gateway, on_started: Callable[[], None] | None = None) -> uvicorn.Server:
    """A server for one gateway. `on_started` is called once it accepts connections."""
    config = gateway.services.config

    class Protocol(GuardedProtocol):
        limits = config.limits

    return _Server(
        uvicorn.Config(
            for_pages_of(config.allowed_origins, gateway),
            host=config.host,
            port=config.port,
            loop="uvloop",
            http=Protocol,
            ws="none",
            lifespan="on",
            interface="asgi3",
            log_config=None,
            # uvicorn warns once per malformed request, which would let anyone fill the log.
            log_level="error",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            backlog=_BACKLOG,
            timeout_keep_alive=int(config.limits.max_idle_connection_seconds),
            timeout_graceful_shutdown=int(config.limits.max_drain_seconds) + _LAST_WORDS_SECONDS,
        ),
        gateway,
        on_started,
    )


def run(
    config: GatewayConfig,
    front: Front,
    sampling: SamplingFactory,
    models: Sequence[ServedModel],
    keys: ApiKeys,
    *,
    listener: socket.socket | None = None,
    on_started: Callable[[int], None] | None = None,
) -> None:
    """Serves until SIGTERM or SIGINT. `on_started` is called with the port once connections are accepted.

    `listener` is the configuration's, for whoever had to know earlier that there is one. Raises `ConfigError` before
    that, also when it cannot listen.
    """
    gateway = Gateway(config, front, sampling, models, keys)
    if not gateway.services.keys.required:
        _log.warning(
            "no API key is set: everyone on this machine may use the model (listening on %s only)", config.host
        )
    listener = listener or listen(config)
    server = make_server(gateway, lambda: on_started(listener.getsockname()[1]) if on_started is not None else None)

    # What exists now lives as long as the process: the collector need not walk it again.
    gc.collect()
    gc.freeze()
    with (
        contextlib.closing(front),
        asyncio.Runner(loop_factory=server.config.get_loop_factory()) as runner,
    ):
        runner.run(server.serve(sockets=[listener]))
