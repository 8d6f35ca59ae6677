"""The load generator's own HTTP client: one asyncio connection per request under way, kept for the next.

It reads chunked event streams with as little work per event as possible (no JSON but the last event's usage), because
it shares the machine with the server that it measures. It trusts the server's framing. O(bytes).
"""

from __future__ import annotations

import asyncio
import json
import time

from bench.load import Outcome
from bench.workload import Arrival

_END_OF_HEAD = b"\r\n\r\n"


class RawClient:
    """Sends completions of token ids, streamed. Use from one event loop."""

    def __init__(self, host: str, port: int, model: str, *, stream: bool, api_key: str | None = None) -> None:
        self._host = host
        self._port = port
        self._model = model
        self._stream = stream
        self._authorization = f"Authorization: Bearer {api_key}\r\n" if api_key else ""
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def send(self, prompt: list[int], arrival: Arrival, outcome: Outcome) -> None:
        """One request; what happened is in `outcome`."""
        body = json.dumps(
            {
                "model": self._model,
                "prompt": prompt,
                "max_tokens": arrival.output_tokens,
                "temperature": 0,
                "ignore_eos": True,
                "stream": self._stream,
                **({"stream_options": {"include_usage": True}} if self._stream else {}),
            }
        ).encode()
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: {self._host}:{self._port}\r\n{self._authorization}"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        ).encode()
        try:
            reader, writer, answer = await self._exchange(head + body)
            reusable = False
            try:
                reusable = await self._read(reader, answer.lower(), outcome)
            finally:
                if reusable:
                    self._idle.append((reader, writer))
                else:
                    writer.close()
        except (OSError, asyncio.IncompleteReadError, ValueError) as error:
            outcome.error = f"{type(error).__name__}: {error}"

    async def _exchange(self, request: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter, bytes]:
        """Sends a request; the connection on which its answer has begun, and the answer's head. Servers close a kept
        one when they like, ours after 75 s: that is no answer, and the request is sent on another."""
        while self._idle:
            reader, writer = self._idle.pop()
            try:
                writer.write(request)
                return reader, writer, await reader.readuntil(_END_OF_HEAD)
            except (ConnectionError, asyncio.IncompleteReadError) as error:
                writer.close()
                if isinstance(error, asyncio.IncompleteReadError) and error.partial:
                    raise
        reader, writer = await asyncio.open_connection(self._host, self._port)
        try:
            writer.write(request)
            return reader, writer, await reader.readuntil(_END_OF_HEAD)
        except (OSError, asyncio.IncompleteReadError, ValueError):
            writer.close()
            raise

    async def close(self) -> None:
        """Closes what is kept."""
        for _, writer in self._idle:
            writer.close()
            await writer.wait_closed()
        self._idle.clear()

    async def _read(self, reader: asyncio.StreamReader, head: bytes, outcome: Outcome) -> bool:
        """Reads a response after its head; whether the connection can be used again."""
        status = int(head[9:12])
        if b"transfer-encoding: chunked" in head:
            text = await self._read_chunks(reader, outcome)
        else:
            length = int(head.partition(b"content-length:")[2].partition(b"\r\n")[0])
            text = await reader.readexactly(length)
            outcome.pieces.append(time.perf_counter())
        if status != 200 or b'"error"' in text:
            outcome.error = f"HTTP {status}: {text[:200].decode(errors='replace')}"
        else:
            # The usage is the last of its name: completions of text may contain anything before it.
            outcome.output_tokens = int(text.rpartition(b'"completion_tokens":')[2].partition(b",")[0])
        return b"connection: close" not in head

    async def _read_chunks(self, reader: asyncio.StreamReader, outcome: Outcome) -> bytes:
        """Notes the time of every chunk with text; returns the last one that carries data."""
        last = b""
        while True:
            size = int(await reader.readuntil(b"\r\n"), 16)
            chunk = (await reader.readexactly(size + 2))[:-2]
            if size == 0:
                return last
            if b'"text":"' in chunk:
                outcome.pieces.append(time.perf_counter())
            if b'"error"' in chunk or b"completion_tokens" in chunk:
                last = chunk
