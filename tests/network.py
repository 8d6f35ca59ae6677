"""Hosts for tests: network namespaces, each with an address of its own and a cable to one switch.

The switch is a bridge in the test's own namespace, which has an address too, so that the test is one more host. A cable
can be pulled, and a host can stop sending to another one while it still hears it. Making one takes 50 ms. It needs root
and Linux; it knows nothing of what runs on a host.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

# Addresses that are set aside for tests of networks (RFC 2544), so that nothing real is hidden behind them.
NETWORK = "198.18"


class CannotMakeHosts(Exception):
    """Why this machine has no network namespaces for us."""


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False, timeout=10)
    if done.returncode != 0:
        raise CannotMakeHosts(f"`ip {' '.join(words)}` says: {done.stderr.strip()}")


@dataclass(frozen=True, slots=True)
class Host:
    """A machine of its own, as far as the network is concerned. `words` begin a command that runs on it."""

    name: str
    address: str
    words: tuple[str, ...] = ()

    def pull_cable(self) -> None:
        """Nothing arrives and nothing leaves, and nobody is told."""
        _ip("link", "set", self._socket, "down")

    def plug_in(self) -> None:
        """Undoes `pull_cable`."""
        _ip("link", "set", self._socket, "up")

    @contextmanager
    def unplugged(self) -> Iterator[None]:
        """Without a cable for a while."""
        self.pull_cable()
        try:
            yield
        finally:
            self.plug_in()

    @contextmanager
    def mute_towards(self, other: Host) -> Iterator[None]:
        """What this host sends to the other one is lost for a while; what the other one sends arrives."""
        _ip("-n", self.name, "route", "add", "blackhole", f"{other.address}/32")
        try:
            yield
        finally:
            _ip("-n", self.name, "route", "del", "blackhole", f"{other.address}/32")

    @property
    def _socket(self) -> str:
        """The switch's end of its cable."""
        return f"{self.name}s"


@contextmanager
def hosts(*letters: str) -> Iterator[tuple[Host, ...]]:
    """Hosts on one switch, by letters that name them. Raises CannotMakeHosts where that is not possible."""
    if shutil.which("ip") is None:
        raise CannotMakeHosts("network namespaces are made by `ip`, which is not installed")
    if os.geteuid() != 0:
        raise CannotMakeHosts("network namespaces of hosts need root")
    # An interface's name has 15 characters at most; the process id keeps runs beside each other apart.
    run = f"ls{os.getpid()}"
    network = f"{NETWORK}.{os.getpid() % 256}"
    with ExitStack() as undo:
        _ip("link", "add", run, "type", "bridge")
        undo.callback(_ip, "link", "del", run)
        _ip("addr", "add", f"{network}.1/24", "dev", run)
        _ip("link", "set", run, "up")
        made = []
        for number, letter in enumerate(letters, start=10):
            host = Host(run + letter, f"{network}.{number}", ("ip", "netns", "exec", run + letter))
            _make(host, run, undo)
            made.append(host)
        yield tuple(made)


def _make(host: Host, switch: str, undo: ExitStack) -> None:
    _ip("netns", "add", host.name)
    undo.callback(_ip, "netns", "del", host.name)
    _ip("link", "add", f"{host.name}s", "type", "veth", "peer", "name", "eth0", "netns", host.name)
    # The pair ends with the namespace, but not at once: its name may be wanted again by the next test.
    undo.callback(_ip, "link", "del", f"{host.name}s")
    _ip("link", "set", f"{host.name}s", "master", switch, "up")
    _ip("-n", host.name, "addr", "add", f"{host.address}/24", "dev", "eth0")
    _ip("-n", host.name, "link", "set", "eth0", "up")
    _ip("-n", host.name, "link", "set", "lo", "up")
