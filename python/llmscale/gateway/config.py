"""Every setting and bound of a gateway, checked once when it starts.

Plain frozen data in O(1); the modules get the part that they need. Knows no default of the core: queue lengths are the
front's.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from llmscale.errors import ConfigError
from llmscale.origins import wrong_origins

if TYPE_CHECKING:
    from llmscale.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class GatewayLimits:
    """Bounds of what one client may send, hold and take."""

    max_body_bytes: int = 4 << 20
    max_json_depth: int = 64
    max_header_bytes: int = 32 << 10
    max_headers: int = 100
    max_header_seconds: float = 10.0
    max_body_seconds: float = 30.0
    max_idle_connection_seconds: float = 75.0
    max_connections: int = 4_096
    max_messages: int = 2_048
    max_sequences: int = 128
    max_request_tokens: int = 1 << 20
    # Each is a line of about 80 bytes in the answer.
    max_request_logprobs: int = 1 << 20
    max_request_seconds: float = 600.0
    max_stream_buffer_bytes: int = 256 << 10
    max_stall_seconds: float = 30.0
    ping_seconds: float = 15.0
    max_drain_seconds: float = 30.0
    # Texts up to this size are rendered and tokenized on the event loop (under 1 ms), larger ones on a thread.
    max_inline_bytes: int = 4 << 10
    # A burst that the front would queue is not refused here; what their texts take is bounded apart (`services`).
    max_waiting_large_prompts: int = 2_048

    def __post_init__(self) -> None:
        for name in self.__slots__:
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} is {getattr(self, name)}, it must be above 0")


@dataclass(frozen=True, slots=True)
class ServedModel:
    """One model under the name that clients use for it."""

    name: str
    tokenizer: Tokenizer
    vocabulary: int
    max_sequence_tokens: int
    created: int
    tokenizer_digest: str | None = None
    """Of the gateway's own folder, in hexadecimal; None where there is no folder to compare."""


@dataclass(frozen=True, slots=True)
class GatewayConfig:
    """How a gateway listens and whom it serves.

    Without API keys only a loopback address is allowed: anyone who reaches the port could use the model.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = ()
    api_key_file: Path | None = None
    limits: GatewayLimits = field(default_factory=GatewayLimits)
    kill_button: bool = False
    """Whether the page may kill the workers of this machine, to see that answers go on."""
    allowed_origins: tuple[str, ...] = ()
    """Of web pages elsewhere that may ask, with a key; `*` alone is every page."""

    def __post_init__(self) -> None:
        self._check_origins()
        if self.kill_button and not is_loopback(self.host):
            raise ConfigError(f"host is {self.host}; a button that kills workers is for 127.0.0.1 only: leave it out")
        if not 0 <= self.port <= 65_535:
            raise ConfigError(f"port is {self.port}, it must be from 0 to 65535")
        if not self.asks_for_keys and not is_loopback(self.host):
            raise ConfigError(
                f"host is {self.host} and no API key is set: anyone on the network could use the model;"
                " set --api-key-file (or --api-key), or listen on 127.0.0.1"
            )

    def _check_origins(self) -> None:
        if (wrong := wrong_origins(self.allowed_origins)) is not None:
            raise ConfigError(f"allowed_origins: {wrong}")
        if not self.allowed_origins:
            return
        if not self.asks_for_keys:
            raise ConfigError(
                f"allowed_origins has {self.allowed_origins[0]} and no API key is set: without keys pages of other"
                " origins are never answered; set --api-key-file (or --api-key), or leave the origins out"
            )
        if self.kill_button:
            raise ConfigError(
                "the button that kills workers is for the gateway's own page, and allowed_origins lets others ask;"
                " leave one of them out"
            )

    @property
    def asks_for_keys(self) -> bool:
        """Whether requests need an API key."""
        return bool(self.api_keys) or self.api_key_file is not None


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
