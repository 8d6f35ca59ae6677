"""A whole gateway on an ephemeral port: the real server and sockets, a scripted front behind them.

`serving` runs it in the test's own event loop, so a test can drive the front between two reads; `exchange` sends raw
bytes and reads until the server closes. `ask` needs no server. Knows nothing of what is tested.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import openai
import uvicorn

from llmscale.gateway.app import Gateway
from llmscale.gateway.asgi import Message, Scope
from llmscale.gateway.auth import load_keys
from llmscale.gateway.config import GatewayConfig, GatewayLimits, ServedModel
from llmscale.gateway.listener import listen
from llmscale.gateway.serve import make_server
from llmscale.tokenizer import Tokenizer
from tests.fakes.fake_front import FakeFront, FakeSampling


@dataclass(slots=True)
class Serving:
    """A running gateway and what is behind it."""

    port: int
    front: FakeFront
    gateway: Gateway
    server: uvicorn.Server
    tokenizer: Tokenizer
    _clients: list[openai.AsyncOpenAI] = field(default_factory=list)
    _connections: list[asyncio.StreamWriter] = field(default_factory=list)

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.port}"

    def client(self, api_key: str = "none-needed") -> openai.AsyncOpenAI:
        """OpenAI's own client, without retries: a test sees every refusal."""
        client = openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key=api_key, max_retries=0, timeout=120)
        self._clients.append(client)
        return client

    async def close_clients(self) -> None:
        """Closes every connection that a test left open."""
        for client in self._clients:
            await client.close()
        for writer in self._connections:
            writer.transport.abort()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    async def raw(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A bare connection."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        self._connections.append(writer)
        return reader, writer

    async def exchange(self, data: bytes, *, seconds: float = 120) -> bytes:
        """Sends bytes and returns everything until the server closes."""
        reader, writer = await self.raw()
        async with asyncio.timeout(seconds):
            writer.write(data)
            with contextlib.suppress(ConnectionError):
                await writer.drain()
            received = b""
            with contextlib.suppress(ConnectionError):
                received = await reader.read()
        writer.close()
        return received


async def until(condition: object, *, seconds: float = 300) -> None:
    """Waits until a callable is true; fails after the deadline."""
    assert callable(condition)
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 - the condition belongs to code that knows no event of ours
            await asyncio.sleep(0.002)


@contextlib.asynccontextmanager
async def serving(
    tokenizer: Tokenizer,
    front: FakeFront | None = None,
    *,
    limits: GatewayLimits | None = None,
    api_keys: tuple[str, ...] = (),
    model: str = "tiny",
    max_sequence_tokens: int = 4_096,
    kill_button: bool = False,
    allowed_origins: tuple[str, ...] = (),
    more_models: Sequence[ServedModel] = (),
) -> AsyncIterator[Serving]:
    """Runs a gateway for `model` and `more_models` until the block ends."""
    front = front or FakeFront()
    limits = limits or GatewayLimits(max_drain_seconds=1)
    config = GatewayConfig(
        port=0, api_keys=api_keys, limits=limits, kill_button=kill_button, allowed_origins=allowed_origins
    )
    served = ServedModel(model, tokenizer, 512, max_sequence_tokens, created=1_700_000_000)
    gateway = Gateway(config, front, FakeSampling, [served, *more_models], load_keys(api_keys, None))
    started = asyncio.Event()
    server = make_server(gateway, started.set)
    # The signals are the test run's. As a fixture the server begins and ends in two runs of the event loop, and put
    # back the first one's handler of SIGINT after the second: a later test that raised SIGINT ended pytest.
    server.capture_signals = contextlib.nullcontext  # type: ignore[method-assign]
    listener = listen(config)
    task = asyncio.ensure_future(server.serve(sockets=[listener]))
    await started.wait()
    running = Serving(listener.getsockname()[1], front, gateway, server, tokenizer)
    try:
        yield running
    finally:
        await running.close_clients()
        server.should_exit = True
        await task
        front.close()


async def ask(gateway: Gateway, path: str, body: bytes) -> tuple[int, dict[str, Any]]:
    """One request straight into the application."""
    sent: list[Message] = []
    headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
    scope: Scope = {"type": "http", "method": "POST", "path": path, "headers": headers}
    waiting = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Message:
        return waiting.pop() if waiting else {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        sent.append(message)

    await gateway(scope, receive, send)
    return sent[0]["status"], json.loads(b"".join(part["body"] for part in sent[1:]))
