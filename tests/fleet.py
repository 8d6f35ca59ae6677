"""A fleet for tests: keys as `llmscale keys` writes them, and the words with which processes are started on them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from llmscale.client import CurveKeys
from tests.network import Host
from tests.processes import Server, free_port, gateway
from tests.support_processes import NodeProcess, node


@dataclass(frozen=True, slots=True)
class Fleet:
    """`keys` and `strangers` are two folders of keys; nodes and gateways here use the first."""

    keys: Path
    strangers: Path

    @property
    def node_key(self) -> str:
        """The nodes' public key."""
        return self._public(self.keys)

    def client(self) -> CurveKeys:
        """The pair of the client that is on the nodes' list."""
        return CurveKeys.load(self.keys / "client-app.key", server=self.node_key)

    def stranger(self) -> CurveKeys:
        """A pair that no list has, with the nodes' true key."""
        return CurveKeys.load(self.strangers / "client-app.key", server=self.node_key)

    def misled(self) -> CurveKeys:
        """The listed pair, with a node's key that is not the nodes'."""
        return CurveKeys.load(self.keys / "client-app.key", server=self._public(self.strangers))

    @contextmanager
    def node(
        self, folder: Path, *options: str, address: str = "", listen: str = "", on: Host | None = None
    ) -> Iterator[NodeProcess]:
        """A node in float32 on one thread, so that several of them leave a core and give the same ids."""
        words = ("--key-file", str(self.keys / "node.key"), "--allow-list", str(self.keys / "allowed"))
        words += ("--threads", "1", "--dtype", "float32", *options)
        if on is not None:
            address = address or f"tcp://{on.address}:7000"
        address = address or f"tcp://127.0.0.1:{free_port()}"
        with node(folder, *words, address=address, listen=listen, keys=self.client(), on=on) as started:
            yield started

    @contextmanager
    def gateway(
        self, *nodes: NodeProcess | str, max_wait_seconds: float = 60.0, on: Host | None = None
    ) -> Iterator[Server]:
        """A gateway in front of nodes, or of addresses that lead to them."""
        words = ("--key-file", str(self.keys / "gateway-edge.key"), f"--node-key={self.node_key}")
        words += ("--max-wait-seconds", str(max_wait_seconds))
        addresses = [to if isinstance(to, str) else to.address for to in nodes]
        with gateway(addresses, *words, on=on) as server:
            yield server

    @staticmethod
    def _public(folder: Path) -> str:
        return (folder / "node.public").read_text(encoding="ascii").strip()
