"""The socket on which a gateway will accept connections. Made first, so that a port that somebody has is an error
before anything else is begun. Knows nothing of what is served.
"""

from __future__ import annotations

import socket

from llmscale.errors import ConfigError
from llmscale.gateway.config import GatewayConfig


def listen(config: GatewayConfig) -> socket.socket:
    """The listening socket of a configuration. Raises `ConfigError`."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {config.host} port {config.port}: {error.strerror or error}; choose another port or"
            " address, or end what uses it"
        ) from error
    return listener
