"""Goal: a client that stood still for a moment hears what its node had said before it takes the node for lost.

Method: a socket in the test's own thread plays the node, so that everything which it does between two turns of the
event loop has happened before the client looks; then the loop's callbacks are called in the order that hurts.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgpack
import pytest
import zmq

from llmscale import errors
from llmscale.client import node_transport, wire
from llmscale.client.calls import Call
from llmscale.client.node_transport import NodeAnswer, NodeTransport
from llmscale.client.session import MAX_SILENCE_SECONDS
from llmscale.types import SamplingParams
from tests.unit.client.test_session import outputs, welcome

WAIT_SECONDS = 60
HELLO, SUBMIT = 0, 1
TOKENS = [10, 11, 12]
CALL = Call((3, 4), None, SamplingParams(max_tokens=3), None, "standard", None, True)


class PlayedNode:
    """The listening end, which is told what to say."""

    def __init__(self, folder: Path) -> None:
        self.address = f"ipc://{folder}/node"
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.bind(self.address)
        self._client = b""

    async def hear(self) -> tuple[int, Any]:
        """The kind and the fields of the next frame."""
        assert await asyncio.to_thread(self._socket.poll, WAIT_SECONDS * 1_000), "the client says nothing"
        self._client, data = self._socket.recv_multipart()
        _, kind, fields = msgpack.unpackb(data)
        return kind, fields

    async def hear_of(self, kind: int) -> Any:
        """The fields of the next frame of a kind."""
        while True:
            found, fields = await self.hear()
            if found == kind:
                return fields

    def say(self, frame: bytes) -> None:
        """To the client that was heard last."""
        self._socket.send_multipart([self._client, frame])

    def leave(self) -> None:
        """Everything that was said leaves before."""
        self._socket.close(linger=WAIT_SECONDS * 1_000)
        self._context.term()


@pytest.fixture
def played(tmp_path: Path) -> Iterator[PlayedNode]:
    node = PlayedNode(tmp_path)
    yield node
    node.leave()


def transport_to(address: str) -> NodeTransport:
    return NodeTransport(address, keys=None, fleet="llmscale", tokenizer=lambda _: None, connect_seconds=WAIT_SECONDS)


@asynccontextmanager
async def asking(node: PlayedNode) -> AsyncIterator[tuple[NodeTransport, NodeAnswer]]:
    """A client whose request the node has; all of its tokens have been sent, and nobody has looked yet."""
    transport = transport_to(node.address)
    try:
        starting = asyncio.create_task(transport.start(CALL))
        await node.hear_of(HELLO)
        node.say(welcome())
        answer = await starting
        request = (await node.hear_of(SUBMIT))[0]
        rows = [(request, index, token) for index, token in enumerate(TOKENS)]
        node.say(outputs(rows, [(request, 1, 1, len(rows))]))
        yield transport, answer
    finally:
        await transport.close()


async def tokens_of(answer: NodeAnswer) -> list[int]:
    return [token for chunk in await answer.next() for token in chunk.token_ids]


async def test_tokens_that_came_before_the_connection_ended_are_delivered(played: PlayedNode) -> None:
    async with asking(played) as (transport, answer):
        played.leave()
        monitor = transport._monitor
        assert monitor is not None
        assert monitor.poll(WAIT_SECONDS * 1_000), "the connection has ended"
        transport._on_connection()
        assert await tokens_of(answer) == TOKENS


async def test_what_was_sent_to_a_node_that_had_left_does_not_reach_its_successor(
    played: PlayedNode, tmp_path: Path
) -> None:
    async with asking(played) as (transport, answer):
        played.leave()
        monitor, session = transport._monitor, transport._session
        assert monitor is not None
        assert monitor.poll(WAIT_SECONDS * 1_000), "the connection has ended"
        session.outgoing.append(wire.ping(1))
        transport._send()
        assert not session.outgoing, "libzmq has it"
        transport._on_connection()
        assert await tokens_of(answer) == TOKENS
        successor = PlayedNode(tmp_path)
        kind, _ = await successor.hear()
        assert kind == HELLO
        successor.leave()


async def test_a_node_is_not_silent_to_a_client_that_has_not_listened(
    played: PlayedNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with asking(played) as (transport, answer):
        socket = transport._socket
        assert socket is not None
        assert socket.poll(WAIT_SECONDS * 1_000), "the tokens have arrived"
        later = time.monotonic() + 2 * MAX_SILENCE_SECONDS
        with monkeypatch.context() as patch:
            patch.setattr(node_transport.time, "monotonic", lambda: later)
            transport._on_time()
        assert await tokens_of(answer) == TOKENS


async def test_a_peer_that_hangs_up_is_connected_to_at_the_pace_of_libzmq() -> None:
    contexts, third = list[object](), asyncio.Event()

    async def hang_up(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        contexts.append(transport._context)
        if len(contexts) >= 3:
            third.set()
        writer.close()

    async with await asyncio.start_server(hang_up, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        transport = transport_to(f"tcp://127.0.0.1:{port}")
        starting = asyncio.create_task(transport.start(CALL))
        async with asyncio.timeout(WAIT_SECONDS):
            await third.wait()
        assert all(context is contexts[0] for context in contexts), "a new context would not wait"
        await transport.close()
        with pytest.raises(errors.Cancelled):
            await starting
