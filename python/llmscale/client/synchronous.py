"""`Client`: the same client for programs without an event loop.

It runs an `AsyncClient` on a thread of its own, so nothing exists twice, connections stay alive while the program
computes, and any thread may use or cancel anything. A call costs a hand-over to a thread and back (80 us); a stream
hands over everything that has come meanwhile at once. Knows nothing of transports.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import CancelledError
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

from llmscale import errors
from llmscale.client.asynchronous import AsyncClient, AsyncStream
from llmscale.client.calls import Message, Prompt
from llmscale.client.keys import CurveKeys
from llmscale.client.results import Health, ModelInfo, StreamChunk
from llmscale.types import RequestOutput, SamplingParams

if TYPE_CHECKING:
    from llmscale.tokenizer import Tokenizer

_T = TypeVar("_T")


class _LoopThread:
    """An event loop on a thread, started by its first use."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._closed = False

    def run(self, coroutine: Coroutine[Any, Any, _T]) -> _T:
        """Runs to the end there and returns or raises here. An interrupt here cancels it there."""
        try:
            loop = self._started()
        except BaseException:
            coroutine.close()
            raise
        future = asyncio.run_coroutine_threadsafe(coroutine, loop)
        try:
            return future.result()
        except CancelledError as error:
            raise errors.Cancelled("this client was closed while it waited for an answer") from error
        except BaseException:
            future.cancel()
            raise

    def post(self, call: Callable[[], None]) -> None:
        """Calls a function there, without waiting; after the end there is nothing left to do."""
        with self._lock:
            if self._loop is not None and not self._closed:
                self._loop.call_soon_threadsafe(call)

    def close(self, last: Coroutine[Any, Any, None]) -> None:
        """Runs a last coroutine and ends the thread."""
        with self._lock:
            loop, thread, was_closed = self._loop, self._thread, self._closed
            self._closed = True
        if loop is None or thread is None or was_closed:
            last.close()
            return
        asyncio.run_coroutine_threadsafe(_end_with(last), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()

    def _started(self) -> asyncio.AbstractEventLoop:
        with self._lock:
            if self._closed:
                raise errors.TransportError("this client was closed; make a new one")
            if self._loop is None:
                loop = self._loop = asyncio.new_event_loop()
                self._thread = threading.Thread(target=loop.run_forever, name="llmscale-client", daemon=True)
                self._thread.start()
            return self._loop


async def _end_with(last: Coroutine[Any, Any, None]) -> None:
    """Runs a last coroutine and ends all others: a thread that waits for one would wait for ever."""
    await last
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)


class Stream:
    """The pieces of one answer, as they come: `for chunk in stream`.

    Leaving the loop early, `cancel` and `close` end the request on the server. `output` is what has come so far.
    """

    def __init__(self, thread: _LoopThread, stream: AsyncStream) -> None:
        self._thread = thread
        self._stream = stream
        self._waiting: list[StreamChunk] = []

    @property
    def output(self) -> RequestOutput:
        """What has come so far; `finished` says whether that is all."""
        return self._stream.output

    @property
    def restarts(self) -> int:
        """How many failures behind the server the stream has survived."""
        return self._stream.restarts

    def cancel(self) -> None:
        """Ends the request on the server, without waiting; from any thread. One that has ended is no error."""
        self._waiting = []
        self._thread.post(self._stream.cancel)

    def close(self) -> None:
        """The same as `cancel`, for `contextlib.closing`."""
        self.cancel()

    def __next__(self) -> StreamChunk:
        if not self._waiting:
            # Reversed, so that taking the next piece is O(1).
            self._waiting = self._thread.run(self._stream.next_pieces())[::-1]
        if not self._waiting:
            raise StopIteration
        return self._waiting.pop()

    def __iter__(self) -> Iterator[StreamChunk]:
        # A generator, because it is told when its loop is left, and this object is not.
        try:
            while True:
                try:
                    chunk = next(self)
                except StopIteration:
                    return
                yield chunk
        finally:
            self.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel()


class Client:
    """`AsyncClient` without `async`, with the same arguments and errors. Thread-safe; not to be used across `fork`."""

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
        self._client = AsyncClient(
            url, api_key=api_key, tokenizer=tokenizer, keys=keys, fleet=fleet, connect_timeout=connect_timeout
        )
        self._thread = _LoopThread()

    def generate(
        self,
        prompt: str | Sequence[int],
        sampling_params: SamplingParams | None = None,
        *,
        model: str | None = None,
        timeout: float | None = None,
        priority: str = "standard",
        parse_special_tokens: bool = False,
    ) -> RequestOutput:
        """Completes a prompt, a text or token ids. `model` None is the only one served, `timeout` is in seconds.

        Without `sampling_params` the model's author's recommendation holds. Special tokens that a text spells stay text
        unless `parse_special_tokens` makes them their ids. Raises LlmscaleError.
        """
        return self._thread.run(
            self._client.generate(
                prompt,
                sampling_params,
                model=model,
                timeout=timeout,
                priority=priority,
                parse_special_tokens=parse_special_tokens,
            )
        )

    def chat(
        self,
        messages: Sequence[Message],
        sampling_params: SamplingParams | None = None,
        *,
        model: str | None = None,
        timeout: float | None = None,
        priority: str = "standard",
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
    ) -> RequestOutput:
        """Answers a conversation: messages with `role` and `content`. With `continue_final_message=True,
        add_generation_prompt=False` the model goes on with the last one. Raises LlmscaleError.
        """
        return self._thread.run(
            self._client.chat(
                messages,
                sampling_params,
                model=model,
                timeout=timeout,
                priority=priority,
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
    ) -> Stream:
        """The answer piece by piece, to a prompt as in `generate` or to a conversation as in `chat`."""
        stream = self._client.stream(
            prompt,
            sampling_params,
            model=model,
            timeout=timeout,
            priority=priority,
            parse_special_tokens=parse_special_tokens,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
        )
        return Stream(self._thread, stream)

    def models(self) -> list[ModelInfo]:
        """The models that are served."""
        return self._thread.run(self._client.models())

    def health(self) -> Health:
        """How the server is doing."""
        return self._thread.run(self._client.health())

    def close(self) -> None:
        """Ends everything that runs and closes the connections. Closing twice is no error."""
        self._thread.close(self._client.close())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
