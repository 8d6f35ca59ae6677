"""Everything that the routes of one gateway share, made once when it starts.

Plain wiring in O(models): front, driver, models, keys, metrics, limits and the thread for large prompts. Knows nothing
of HTTP.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from llmscale.errors import InvalidField, Overloaded, Unavailable, UnknownModel
from llmscale.gateway.auth import ApiKeys
from llmscale.gateway.body import Arriving
from llmscale.gateway.config import GatewayConfig, ServedModel
from llmscale.gateway.driver import FrontDriver
from llmscale.gateway.front import Front, SamplingFactory
from llmscale.gateway.replicas import ReplicaWatch
from llmscale.gateway.stream import Sweeper
from llmscale.metrics import GatewayMetrics, RequestMetrics

MAX_INLINE_VALUES = 2_048
"""Log probabilities of an answer that are written on the event loop, in a few milliseconds."""
_ECHO_BYTES_PER_VALUE = 1 << 10
MAX_WAITING_PROMPT_BYTES = 256 << 20
"""Of bodies whose texts wait to be tokenized; a single one is bounded by its own limit."""

T = TypeVar("T")


class Services:
    """The parts of a running gateway. `open` needs the running event loop; before that no request can be served."""

    def __init__(
        self,
        config: GatewayConfig,
        front: Front,
        sampling: SamplingFactory,
        models: Sequence[ServedModel],
        keys: ApiKeys,
        *,
        routes: Sequence[str],
    ) -> None:
        self.config = config
        self.limits = config.limits
        self.front = front
        self.sampling = sampling
        self.models = {model.name: model for model in models}
        self.keys = keys
        self.arriving = Arriving()
        per_model = [RequestMetrics(model.name, keys.tenants) for model in models]
        self.metrics = GatewayMetrics(per_model, routes, front.status)
        self._watch = ReplicaWatch(front, self.models)
        self._driver: FrontDriver | None = None
        self._sweeper: Sweeper | None = None
        self._executor: ThreadPoolExecutor | None = None
        self._large_prompts = 0
        self._large_bytes = 0
        self.draining = False

    def open(self) -> None:
        """Joins the event loop."""
        loop = asyncio.get_running_loop()
        self._driver = FrontDriver(self.front, loop, self.limits.max_request_seconds)
        self._sweeper = Sweeper(self.metrics, loop)
        self._watch.start(loop)
        # One thread: it exists to keep the event loop responsive, not to use a second core.
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="llmscale-prompts")

    def close(self) -> None:
        """Leaves the event loop; live requests are cancelled."""
        self._watch.stop()
        if self._driver is not None:
            self._driver.close()
        if self._sweeper is not None:
            self._sweeper.close()
        if self._executor is not None:
            self._executor.shutdown(wait=False, cancel_futures=True)

    @property
    def driver(self) -> FrontDriver:
        """The live requests."""
        if self._driver is None:
            raise Unavailable("this gateway is starting; retry in a moment")
        return self._driver

    @property
    def sweeper(self) -> Sweeper:
        """The open streams."""
        if self._sweeper is None:
            raise Unavailable("this gateway is starting; retry in a moment")
        return self._sweeper

    def model(self, name: str | None) -> ServedModel:
        """The served model of that name, without a name the only one. Raises `UnknownModel`, or `InvalidField` where a
        name is needed."""
        if name is None and len(self.models) == 1:
            [name] = self.models
        model = None if name is None else self.models.get(name)
        if model is None:
            served = ", ".join(sorted(self.models))
            if name is None:
                raise InvalidField(f"model is missing; served are: {served}", field="model")
            raise UnknownModel(f"the model {name[:64]!r} is not served here; served are: {served}", field="model")
        return model

    async def compute(self, work: Callable[[], T], size_bytes: int) -> T:
        """Runs work whose time grows with a text: small texts here, large ones on the thread, in order and bounded."""
        if size_bytes <= self.limits.max_inline_bytes:
            return work()
        if self._executor is None or self._large_prompts >= self.limits.max_waiting_large_prompts:
            raise Overloaded(
                f"{self._large_prompts} large prompts wait to be tokenized, the limit is"
                f" {self.limits.max_waiting_large_prompts}; retry in a second",
                retry_after_seconds=1.0,
            )
        if self._large_prompts and self._large_bytes + size_bytes > MAX_WAITING_PROMPT_BYTES:
            raise Overloaded(
                f"prompts of {self._large_bytes} bytes wait to be tokenized, with these {size_bytes} they are more than"
                f" {MAX_WAITING_PROMPT_BYTES}; retry in a second",
                retry_after_seconds=1.0,
            )
        self._large_prompts += 1
        self._large_bytes += size_bytes
        try:
            return await asyncio.get_running_loop().run_in_executor(self._executor, work)
        finally:
            self._large_prompts -= 1
            self._large_bytes -= size_bytes

    async def build(self, work: Callable[[], T], values: int, echo_bytes: int) -> T:
        """Makes the body of an answer with so many log probabilities and so much of its prompts: of many on the thread,
        since a million of them are seconds in which no stream would get a token. Never refused: what it tells has been
        computed."""
        if values + echo_bytes // _ECHO_BYTES_PER_VALUE <= MAX_INLINE_VALUES or self._executor is None:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self._executor, work)

    def drain(self, error: Unavailable) -> None:
        """Stops taking requests. What runs may finish until `error` ends it, which the caller times."""
        self.draining = True
        self.driver.refuse_new()
        asyncio.get_running_loop().call_later(self.limits.max_drain_seconds, self.driver.fail_all, error)
