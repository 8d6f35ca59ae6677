"""`AsyncClient`: the whole client, on the caller's event loop.

`async with AsyncClient(url) as client: async for chunk in client.stream("Once upon")`. The address chooses the
transport; what is done with it is the same for both. Streams end their request when they are left, each call has a
bound on its whole time, and every failure is an error of `llmscale.errors`. Not for use by several event loops.
"""

from __future__ import annotations

import asyncio
import collections
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from llmscale import errors
from llmscale.client import wire
from llmscale.client.calls import Call, Message, Prompt, split_input
from llmscale.client.keys import CurveKeys
from llmscale.client.results import Health, ModelInfo, StreamChunk
from llmscale.client.transport import Answer, Transport
from llmscale.types import RequestOutput, SamplingParams

if TYPE_CHECKING:
    from llmscale.tokenizer import Tokenizer


class AsyncStream:
    """The pieces of one answer, as they come: `async for chunk in stream`.

    Leaving the loop early, `cancel` and `aclose` end the request on the server. `output` is what has come so far.
    """

    def __init__(self, transport: Transport, call: Call) -> None:
        self._transport = transport
        self._call = call
        self._answer: Answer | None = None
        self._waiting: collections.deque[StreamChunk] = collections.deque()
        self._deadline: float | None = None
        self._ended = False
        self._cancelled = False

    @property
    def output(self) -> RequestOutput:
        """What has come so far; `finished` says whether that is all."""
        if self._answer is None:
            return RequestOutput("", self._call.prompt_text, self._call.prompt_ids, (), finished=False)
        return self._answer.assembly.output(finished=self._ended and not self._cancelled)

    @property
    def restarts(self) -> int:
        """How many failures behind the server the stream has survived."""
        return 0 if self._answer is None else self._answer.assembly.restarts

    def cancel(self) -> None:
        """Ends the request on the server, without waiting. One that has ended is no error."""
        if not self._ended:
            self._cancelled = True
        self._ended = True
        self._waiting.clear()
        if self._answer is not None:
            self._answer.cancel()

    async def aclose(self) -> None:
        """The same as `cancel`, for `contextlib.aclosing`."""
        self.cancel()

    async def next_pieces(self) -> list[StreamChunk]:
        """Everything that has come since the last call, at least one piece; nothing at the end."""
        if self._waiting:
            waiting = list(self._waiting)
            self._waiting.clear()
            return waiting
        if self._ended:
            return []
        try:
            return await self._next()
        except TimeoutError as error:
            self.cancel()
            raise self._call.late() from error
        except BaseException:
            self.cancel()
            raise

    async def _next(self) -> list[StreamChunk]:
        seconds = self._call.timeout_seconds
        if seconds is not None and self._deadline is None:
            self._deadline = asyncio.get_running_loop().time() + seconds
        async with asyncio.timeout_at(self._deadline):
            if self._answer is None:
                self._answer = await self._transport.start(self._call)
                if self._cancelled:
                    self._answer.cancel()
            chunks = await self._answer.next()
        add = self._answer.assembly.add
        for chunk in chunks:
            add(chunk)
        if not chunks:
            self._ended = True
        return chunks

    async def __anext__(self) -> StreamChunk:
        if not self._waiting:
            self._waiting.extend(await self.next_pieces())
        if not self._waiting:
            raise StopAsyncIteration
        return self._waiting.popleft()

    async def __aiter__(self) -> AsyncIterator[StreamChunk]:
        # A generator, because it is told when its loop is left, and this object is not.
        try:
            while chunks := await self.next_pieces():
                for chunk in chunks:
                    yield chunk
        finally:
            self.cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel()


class AsyncClient:
    """A client of a gateway (`http://` or `https://`) or of one node (`tcp://` or `ipc://`).

    `api_key` is for gateways. For nodes: `tokenizer` is the model's (a folder, the name of an embedded model or a
    `Tokenizer`) and is needed for text, `keys` are needed beyond this machine, `fleet` must be the node's.
    `connect_timeout` is how long, in seconds, a server may take to be there, and a gateway to say how it is and what it
    serves. Raises ConfigError for options that do not fit the address.
    """

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        tokenizer: str | Path | Tokenizer | None = None,
        keys: CurveKeys | None = None,
        fleet: str = "llmscale",
        connect_timeout: float = 10.0,
    ) -> None:
        if not connect_timeout > 0:
            raise errors.ConfigError(f"connect_timeout is {connect_timeout}, it must be above 0 seconds")
        self._transport = _transport(url, api_key, tokenizer, keys, fleet, connect_timeout)
        self._closed = False

    async def generate(
        self,
        prompt: str | Sequence[int],
        sampling_params: SamplingParams | None = None,
        *,
        model: str | None = None,
        timeout: float | None = None,  # noqa: ASYNC109 - part of the request: the server gets it too
        priority: str = "standard",
        parse_special_tokens: bool = False,
    ) -> RequestOutput:
        """Completes a prompt, a text or token ids. `model` None is the only one served, `timeout` is in seconds.

        Without `sampling_params` the model's author's recommendation holds. Special tokens that a text spells stay text
        unless `parse_special_tokens` makes them their ids. Raises LlmscaleError.
        """
        text, messages = split_input(prompt)
        call = Call(
            text,
            messages,
            sampling_params,
            model,
            priority,
            timeout,
            streaming=False,
            parse_special_tokens=parse_special_tokens,
        )
        return await self._whole(call)

    async def chat(
        self,
        messages: Sequence[Message],
        sampling_params: SamplingParams | None = None,
        *,
        model: str | None = None,
        timeout: float | None = None,  # noqa: ASYNC109 - as in `generate`
        priority: str = "standard",
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
    ) -> RequestOutput:
        """Answers a conversation: messages with `role` and `content`. With `continue_final_message=True,
        add_generation_prompt=False` the model goes on with the last one. Raises LlmscaleError.
        """
        return await self._whole(
            Call(
                None,
                _conversation(messages),
                sampling_params,
                model,
                priority,
                timeout,
                streaming=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
            )
        )

    def stream(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        model: str | None = None,
        timeout: float | None = None,
        priority: str = "standard",
        parse_special_tokens: bool = False,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
    ) -> AsyncStream:
        """The answer piece by piece, to a prompt as in `generate` or to a conversation as in `chat`."""
        self._check_open()
        text, messages = split_input(prompt)
        call = Call(
            text,
            messages,
            sampling_params,
            model,
            priority,
            timeout,
            streaming=True,
            parse_special_tokens=parse_special_tokens,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
        )
        return AsyncStream(self._transport, call)

    async def models(self) -> list[ModelInfo]:
        """The models that are served."""
        self._check_open()
        return await self._transport.models()

    async def health(self) -> Health:
        """How the server is doing."""
        self._check_open()
        return await self._transport.health()

    async def close(self) -> None:
        """Ends everything that runs and closes the connections. Closing twice is no error."""
        self._closed = True
        await self._transport.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _whole(self, call: Call) -> RequestOutput:
        self._check_open()
        stream = AsyncStream(self._transport, call)
        while await stream.next_pieces():
            pass
        return stream.output

    def _check_open(self) -> None:
        if self._closed:
            raise errors.TransportError("this client was closed; make a new one")


def _conversation(messages: Sequence[Message]) -> tuple[Message, ...]:
    text, found = split_input(messages)
    if found is None:
        raise errors.InvalidField(
            f"messages must be objects with role and content, not {type(text).__name__}", field="messages"
        )
    return found


def _transport(
    url: str,
    api_key: str | None,
    tokenizer: str | Path | Tokenizer | None,
    keys: CurveKeys | None,
    fleet: str,
    connect_seconds: float,
) -> Transport:
    scheme = url.partition("://")[0]
    if scheme in ("http", "https"):
        if tokenizer is not None or keys is not None:
            raise errors.ConfigError("tokenizer and keys are for nodes; a gateway needs neither, leave them out")
        from llmscale.client.http_transport import HttpTransport

        return HttpTransport(url, api_key=api_key, connect_seconds=connect_seconds)
    if scheme in ("tcp", "ipc"):
        if api_key is not None:
            raise errors.ConfigError("api_key is for gateways; a node knows its clients by their CURVE keys (keys=)")
        from llmscale.client.node_transport import NodeTransport

        return NodeTransport(
            url,
            keys=keys,
            fleet=fleet,
            tokenizer=lambda welcome: _load_tokenizer(tokenizer, welcome),
            connect_seconds=connect_seconds,
        )
    raise errors.ConfigError(f"the address {url!r} must begin with http://, https://, tcp:// or ipc://")


def _load_tokenizer(source: str | Path | Tokenizer | None, welcome: wire.Welcome) -> Tokenizer | None:
    if source is None:
        return None
    from llmscale.models.fingerprint import tokenizer_digest
    from llmscale.models.locate import locate_model
    from llmscale.tokenizer import Tokenizer

    if isinstance(source, Tokenizer):
        return source
    folder = locate_model(str(source))
    if tokenizer_digest(folder) != welcome.model.tokenizer_digest:
        raise errors.InvalidTokenizer(
            f"the tokenizer in {folder} is not the one of {welcome.model.name!r}, which the node serves; give that"
            " model's folder"
        )
    return Tokenizer(folder, vocabulary=welcome.limits.vocabulary)
