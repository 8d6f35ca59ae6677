"""By which network interface of this host another one is reached: what torch.distributed and streams have to be told.

Asks the kernel's routing table with a socket that sends nothing, then compares addresses interface by interface. IPv4
only, because the kernel's question is. It does not know who listens there.
"""

from __future__ import annotations

import fcntl
import socket
import struct

from llmscale.errors import ConfigError

_GET_ADDRESS = 0x8915  # SIOCGIFADDR of Linux
_NAME_BYTES = 16


def interface_towards(url: str) -> str:
    """The interface on the way to tcp://HOST:PORT; loopback for any other url. Raises ConfigError."""
    scheme, _, address = url.partition("://")
    if scheme != "tcp":
        return "lo"
    host, _, port = address.rpartition(":")
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, int(port)))
            own = probe.getsockname()[0]
            for _, name in socket.if_nameindex():
                if _address(probe, name) == own:
                    return name
    except OSError as error:
        raise ConfigError(f"there is no way from here to {url}: {error}; check --leader, or routes") from error
    # 127.0.1.1 and its like belong to an interface that bears another address of their network.
    if own.startswith("127."):
        return "lo"
    raise ConfigError(
        f"the way to {url} begins at {own}, which no interface bears; set GLOO_SOCKET_IFNAME to the right one"
    )


def address_of(interface: str) -> str:
    """Its address. Raises ConfigError where it has none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        address = _address(probe, interface)
    if address is None:
        raise ConfigError(f"interface {interface!r} has no IPv4 address; set GLOO_SOCKET_IFNAME to one that has")
    return address


def _address(probe: socket.socket, name: str) -> str | None:
    request = struct.pack(f"{_NAME_BYTES}s{_NAME_BYTES}x", name.encode())
    try:
        answer = fcntl.ioctl(probe.fileno(), _GET_ADDRESS, request)
    except OSError:
        # An interface without an address of IPv4.
        return None
    return socket.inet_ntoa(answer[20:24])
