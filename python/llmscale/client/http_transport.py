"""A gateway over HTTP: one connection pool, responses as they come.

Each answer is read by a task of its own into a bounded queue, so that cancelling is possible at any moment and a slow
reader holds the server back instead of filling memory. A dropped connection tells the gateway to stop. Costs are those
of the bytes. Knows nothing of what is in them.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Final
from urllib.parse import urlsplit

import httpx2

from llmscale import errors
from llmscale.client import http_format
from llmscale.client.calls import Call
from llmscale.client.http_format import HttpReply
from llmscale.client.results import Assembly, Health, ModelInfo, StreamChunk

_MAX_WAITING_PIECES: Final = 64
_LOOPBACK: Final = frozenset({"127.0.0.1", "localhost", "::1"})
_NOT_FOUND: Final = 404


class HttpAnswer:
    """One request to a gateway."""

    def __init__(self, reply: HttpReply, read: Callable[[HttpReply], AsyncIterator[list[StreamChunk]]]) -> None:
        self._reply = reply
        self._queue: asyncio.Queue[list[StreamChunk] | errors.LlmscaleError | None] = asyncio.Queue(_MAX_WAITING_PIECES)
        self._end: errors.LlmscaleError | None = None
        self._ended = False
        self._task = asyncio.create_task(self._run(read))

    @property
    def assembly(self) -> Assembly:
        return self._reply.assembly

    @property
    def task(self) -> asyncio.Task[None]:
        """Ends when the answer has."""
        return self._task

    async def next(self) -> list[StreamChunk]:
        if self._ended:
            if self._end is not None:
                raise self._end
            return []
        item = await self._queue.get()
        if isinstance(item, list):
            return item
        self._ended, self._end = True, item
        return await self.next()

    def cancel(self) -> None:
        self._task.cancel()
        if not self._ended:
            self._ended, self._end = True, errors.Cancelled("the request was cancelled by this client")
            if self._queue.empty():
                # Whoever waits for the next piece hears of it.
                self._queue.put_nowait(self._end)

    async def _run(self, read: Callable[[HttpReply], AsyncIterator[list[StreamChunk]]]) -> None:
        try:
            async for chunks in read(self._reply):
                if chunks:
                    await self._queue.put(chunks)
        except errors.LlmscaleError as error:
            await self._queue.put(error)
        except Exception as error:  # noqa: BLE001 - whoever waits must hear of every end, also an unforeseen one
            failed = errors.TransportError(f"the answer could not be read: {type(error).__name__}: {error}")
            failed.__cause__ = error
            await self._queue.put(failed)
        else:
            await self._queue.put(None)


class HttpTransport:
    """A client's connections to one gateway."""

    def __init__(self, url: str, *, api_key: str | None, connect_seconds: float) -> None:
        self._url = _checked_url(url)
        self._headers = {} if api_key is None else {"authorization": f"Bearer {_checked_key(api_key)}"}
        self._connect_seconds = connect_seconds
        # Reading has no limit of its own: a whole answer has, and a long prompt is silent for long.
        self._patient = httpx2.Timeout(None, connect=connect_seconds)
        # What a gateway knows by heart it says at once, or it is not there.
        self._brief = httpx2.Timeout(connect_seconds)
        self._http: httpx2.AsyncClient | None = None
        self._models: dict[str, ModelInfo] = {}
        self._answers: set[HttpAnswer] = set()

    async def start(self, call: Call) -> HttpAnswer:
        model = await self._model(call.model)
        body = http_format.request_body(call, model)
        path = http_format.path_of(call)

        async def read(reply: HttpReply) -> AsyncIterator[list[StreamChunk]]:
            async with self._request("POST", path, body, self._patient) as response:
                if not call.streaming:
                    yield reply.whole(await response.aread())
                    return
                async for data in response.aiter_raw():
                    # To its end, also after the last event: a connection that is left before that is not used again.
                    yield reply.feed(data)
                if not reply.done:
                    raise errors.TransportError("the connection ended in the middle of an answer")

        answer = HttpAnswer(HttpReply(call), read)
        self._answers.add(answer)
        answer.task.add_done_callback(lambda _: self._answers.discard(answer))
        return answer

    async def models(self) -> list[ModelInfo]:
        async with self._request("GET", "/v1/models", None, self._brief) as response:
            found = http_format.models(await response.aread())
        self._models = {model.name: model for model in found}
        return found

    async def health(self) -> Health:
        async with self._request("GET", "/fleet", None, self._brief) as response:
            return http_format.health(await response.aread())

    async def close(self) -> None:
        answers = list(self._answers)
        for answer in answers:
            # Whoever waits for its next piece is told, too.
            answer.cancel()
        await asyncio.gather(*(answer.task for answer in answers), return_exceptions=True)
        if self._http is not None:
            await self._http.aclose()
            self._http = None

    async def _model(self, name: str | None) -> ModelInfo:
        """The model of a call: the named one, or the only one that is served."""
        if name is not None and name in self._models:
            return self._models[name]
        if name is None and len(self._models) == 1:
            return next(iter(self._models.values()))
        found = await self.models()
        names = ", ".join(sorted(self._models)) or "none"
        if name is None:
            if len(found) != 1:
                raise errors.InvalidField(f"model is needed, served here are: {names}", field="model")
            return found[0]
        if name not in self._models:
            raise errors.UnknownModel(f"model {name!r} is not served here; there are: {names}", field="model")
        return self._models[name]

    @asynccontextmanager
    async def _request(
        self, method: str, path: str, body: bytes | None, patience: httpx2.Timeout
    ) -> AsyncIterator[httpx2.Response]:
        """A response whose status is a success. Every failure of the transport becomes a typed error."""
        try:
            async with self._client().stream(method, path, content=body, timeout=patience) as response:
                if response.status_code == _NOT_FOUND:
                    # Another model may be served here by now: the next call asks.
                    self._models = {}
                if not response.is_success:
                    raise http_format.error_of(response.status_code, response.headers, await response.aread())
                yield response
        except httpx2.TimeoutException as error:
            raise errors.ClientTimeout(
                f"{self._url} did not answer within {self._connect_seconds:g} s (connect_timeout):"
                f" {type(error).__name__}; look after the gateway, or give it more time"
            ) from error
        except (httpx2.HTTPError, httpx2.StreamError, httpx2.InvalidURL) as error:
            reason = str(error) or type(error).__name__
            raise errors.TransportError(f"the connection to {self._url} failed: {reason}") from error

    def _client(self) -> httpx2.AsyncClient:
        if self._http is None:
            self._http = httpx2.AsyncClient(
                base_url=self._url,
                headers={"content-type": "application/json", "accept-encoding": "identity", **self._headers},
                timeout=self._patient,
                limits=httpx2.Limits(max_connections=None, max_keepalive_connections=64),
                # A proxy that the environment names cannot reach this machine's own addresses.
                trust_env=urlsplit(self._url).hostname not in _LOOPBACK,
            )
        return self._http


def _checked_url(url: str) -> str:
    """Without a slash at its end. What the parts of the network stack would refuse each in its own way is refused."""
    try:
        port, host = urlsplit(url).port, httpx2.URL(url).host
    except (ValueError, httpx2.InvalidURL) as error:
        raise errors.ConfigError(f"the address {url!r} is no URL: {error}; write it as http://HOST:PORT") from error
    if not host or port == 0:
        raise errors.ConfigError(f"the address {url!r} has no host, or the port 0; write it as http://HOST:PORT")
    return url.rstrip("/")


def _checked_key(api_key: str) -> str:
    # The key itself is not shown: messages end up in logs.
    if not isinstance(api_key, str):
        raise errors.ConfigError(f"api_key is a {type(api_key).__name__}, it must be a text")
    if not (api_key.isascii() and api_key.isprintable()):
        raise errors.ConfigError("api_key has characters that are not printable ASCII; copy it again, whole")
    return api_key
