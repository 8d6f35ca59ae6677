"""A network that misbehaves between a gateway and a node: a proxy for TCP that delays, stalls, cuts and forgets.

Every connection and direction draws from a generator of its own, seeded by the test, so the same seed makes the same
troubles, as far as the same bytes come. What waits in the proxy when a connection is cut is lost, as on a real wire.
Bytes are never reordered or changed: TCP does not, and CURVE would notice. Knows no frames.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import random
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

CHUNK_BYTES = 4_096
LATENCY_SECONDS = (0.0, 0.004)
# A segment that has to be sent again.
LOST_SHARE, RESEND_SECONDS = 0.01, (0.05, 0.25)
TROUBLE_EVERY_SECONDS = (0.5, 2.0)
# Beyond what gateways take for a sign of death, 1.75 s, and below.
STALL_SECONDS = (0.1, 2.6)


class BadLink:
    """One listening port in front of one address. Quiet until `misbehave`, and after `behave`."""

    def __init__(self, target: tuple[str, int], seed: int) -> None:
        self.counts: collections.Counter[str] = collections.Counter()
        self._target = target
        self._seed = seed
        self._bad = False
        self._connections = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._loop = asyncio.new_event_loop()
        self._over = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="bad link")
        self._thread.start()

    @property
    def address(self) -> str:
        """Where to connect instead of the target."""
        return f"tcp://127.0.0.1:{self._listener.getsockname()[1]}"

    def misbehave(self) -> None:
        """Troubles begin."""
        self._bad = True

    def behave(self) -> None:
        """Troubles end; what is stalled goes on when its time is over."""
        self._bad = False

    def close(self) -> None:
        """Cuts all connections and frees the port."""
        self._loop.call_soon_threadsafe(self._over.set)
        self._thread.join(10)
        assert not self._thread.is_alive(), "the proxy's loop did not end"

    def _run(self) -> None:
        self._loop.run_until_complete(self._serve())
        self._loop.close()

    async def _serve(self) -> None:
        server = await asyncio.start_server(self._connect, sock=self._listener)
        await self._over.wait()
        server.close()
        connections = asyncio.all_tasks() - {asyncio.current_task()}
        for connection in connections:
            connection.cancel()
        await asyncio.gather(*connections, return_exceptions=True)

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._connections += 1
        number = self._connections
        try:
            far_reader, far_writer = await asyncio.open_connection(*self._target)
        except OSError:
            writer.transport.abort()
            return
        chance = [random.Random(f"{self._seed} {number} {what}") for what in ("there", "back", "trouble")]
        # Closed while a direction must stand still.
        gates = [asyncio.Event(), asyncio.Event()]
        for gate in gates:
            gate.set()
        ways = [
            asyncio.create_task(self._carry(reader, far_writer, chance[0], gates[0])),
            asyncio.create_task(self._carry(far_reader, writer, chance[1], gates[1])),
            asyncio.create_task(self._trouble(chance[2], gates)),
        ]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)
            writer.transport.abort()
            far_writer.transport.abort()

    async def _carry(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, chance: random.Random, gate: asyncio.Event
    ) -> None:
        with contextlib.suppress(ConnectionError):
            while chunk := await reader.read(CHUNK_BYTES):
                if self._bad:
                    lost = chance.random() < LOST_SHARE
                    self.counts["resent"] += lost
                    await _pass(chance.uniform(*(RESEND_SECONDS if lost else LATENCY_SECONDS)))
                await gate.wait()
                writer.write(chunk)
                await writer.drain()

    async def _trouble(self, chance: random.Random, gates: list[asyncio.Event]) -> None:
        """Returns when the connection is to be cut."""
        while True:
            await _pass(chance.uniform(*TROUBLE_EVERY_SECONDS))
            what = chance.choice(("cut", "cut", "there", "back", "both"))
            if not self._bad:
                continue
            self.counts[what] += 1
            if what == "cut":
                return
            stalled = {"there": gates[:1], "back": gates[1:], "both": gates}[what]
            for gate in stalled:
                gate.clear()
            await _pass(chance.uniform(*STALL_SECONDS))
            for gate in stalled:
                gate.set()


async def _pass(seconds: float) -> None:
    """Lets real time pass: this is what a network does, not what a test waits for."""
    loop = asyncio.get_running_loop()
    over = loop.create_future()
    timer = loop.call_later(seconds, over.set_result, None)
    try:
        await over
    finally:
        timer.cancel()


@contextmanager
def bad_link(address: str, seed: int) -> Iterator[BadLink]:
    """A link in front of tcp://HOST:PORT."""
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    link = BadLink((host, int(port)), seed)
    try:
        yield link
    finally:
        link.close()
