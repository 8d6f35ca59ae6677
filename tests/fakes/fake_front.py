"""A front without replicas: the interface of `_core.Front`, tokens from a function, time only when a test wants it.

Each `take` while `automatic` is on is one step of every live request; otherwise `step` makes progress. A test scripts
tokens, refusals, failures and restarts. O(live requests) per step; knows nothing of text.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from llmscale.errors import InvalidField

Tokens = Callable[[Sequence[int], "FakeSampling"], Iterable[int]]


@dataclass(frozen=True, slots=True)
class FakeSampling:
    """`_core.Sampling` with its checks."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    choice: int = 0
    logprobs: int | None = None
    logit_bias: Sequence[tuple[int, float]] = ()
    max_tokens: int = 16
    min_tokens: int = 0
    stop_tokens: Sequence[int] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        for name, low, high in (
            ("temperature", 0, 100),
            ("top_p", 0, 1),
            ("min_p", 0, 1),
            ("repetition_penalty", 0.01, 100),
        ):
            if not low <= getattr(self, name) <= high:
                raise InvalidField(f"{name} is {getattr(self, name)}, it must be from {low} to {high}", field=name)
        if self.seed is not None and not 0 <= self.seed < 1 << 64:
            raise OverflowError("the seed does not fit into 64 bits")
        if not 1 <= self.max_tokens < 1 << 32 or not 0 <= self.min_tokens <= self.max_tokens:
            raise InvalidField("max_tokens and min_tokens do not fit", field="max_tokens")


@dataclass(frozen=True, slots=True)
class FakeDelivery:
    """`_core.Delivery`."""

    request: int
    index: int
    tokens: list[int]
    finish_reason: str | None
    output_tokens: int
    logprobs: list[tuple[float, list[tuple[int, float]]]] | None = None
    cached_tokens: int = 0
    restarts: int = 0


@dataclass(frozen=True, slots=True)
class FakeReplica:
    """`_core.ReplicaStatus`."""

    node: str = "tcp://127.0.0.1:9000"
    state: str = "ready"
    trust: str = "trusted"
    ejections: int = 0
    recent_answers: int = 0
    recent_late: int = 0
    recent_failures: int = 0
    running: int = 0
    waiting: int = 0
    free_blocks: int = 100
    total_blocks: int = 128
    steps: int = 0
    worker_restarts: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    offloaded_blocks: int = 0
    restored_blocks: int = 0
    bad_host_blocks: int = 0
    disk_written_blocks: int = 0
    disk_read_blocks: int = 0
    bad_disk_blocks: int = 0
    failed_disk_writes: int = 0
    disk_waits: int = 0
    lost_disk_records: int = 0
    predicted_step_ns: int = 0
    step_error_ns: int = 0
    paced_steps: int = 0
    preemptions: int = 0
    model: str = "tiny"
    weights_digest: str = "aa" * 32
    tokenizer_digest: str = "bb" * 32
    numerics: str = "a+bfloat16"
    max_sequence_tokens: int = 1 << 20
    vocabulary: int = 512
    worker_pid: int = 4242
    step_ns: int = 0
    stage_wait_ns: int = 0


@dataclass(frozen=True, slots=True)
class FakeStatus:
    """`_core.FrontStatus`."""

    queued_requests: int
    queued_tokens: int
    live_requests: int
    replicas: list[FakeReplica]
    numerics_changes: int = 0
    lost_attempts: int = 0
    moved_attempts: int = 0
    stale_frames: int = 0
    stale_rows: int = 0
    known_prefixes: int = 0
    prefix_bytes: int = 0
    prefix_gaps: int = 0
    ejections: int = 0
    failed_probes: int = 0
    spared_replicas: int = 0
    retries: int = 0
    repeated_retries: int = 0
    retries_delayed: int = 0
    hedges: int = 0
    hedge_wins: int = 0
    hedged_tokens: int = 0
    first_attempt_tokens: int = 0


@dataclass(slots=True)
class Submitted:
    """One request as the gateway sent it."""

    tenant: str
    model: str
    prompt: list[int]
    sampling: FakeSampling
    priority: str
    timeout_us: int | None
    source: Iterator[int]
    emitted: int = 0
    restarts: int = 0


def hash_tokens(
    prompt: Sequence[int], sampling: FakeSampling, *, vocabulary: int = 400, first: int = 3
) -> Iterator[int]:
    """An endless stream that depends on the prompt, the seed and the choice only."""
    state = hash((tuple(prompt), sampling.seed, sampling.choice)) & 0xFFFFFFFF
    while True:
        state = (state * 1_664_525 + 1_013_904_223) & 0xFFFFFFFF
        yield first + (state >> 16) % (vocabulary - first)


@dataclass(slots=True)
class FakeFront:
    """A scripted front. `tokens` gives the output of a request, `eos` ends it unless it ignores that."""

    tokens: Tokens = hash_tokens
    eos: frozenset[int] = frozenset({0, 2})
    automatic: bool = True
    refusal: Exception | None = None
    replicas: list[FakeReplica] = field(default_factory=lambda: [FakeReplica()])
    submitted: dict[int, Submitted] = field(default_factory=dict)
    live: dict[int, Submitted] = field(default_factory=dict)
    cancelled: dict[int, int | None] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    closed: bool = False
    likelier: int = 0
    """How many tokens are likelier than the drawn one: those with the ids before its own."""
    _ready: list[FakeDelivery] = field(default_factory=list)
    _eventfd: int = field(default_factory=lambda: os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC))
    _next: int = 1

    def fileno(self) -> int:
        return self._eventfd

    def submit(
        self,
        tenant: str,
        model: str,
        prompt: Sequence[int],
        sampling: FakeSampling,
        *,
        priority: str = "standard",
        timeout_us: int | None = None,
        detached: bool = False,
    ) -> int:
        if self.refusal is not None:
            raise self.refusal
        request, self._next = self._next, self._next + 1
        source = iter(self.tokens(prompt, sampling))
        self.submitted[request] = self.live[request] = Submitted(
            tenant, model, list(prompt), sampling, priority, timeout_us, source
        )
        if self.automatic:
            self._signal()
        return request

    def cancel(self, request: int, at_token: int | None = None) -> None:
        self.live.pop(request, None)
        self.cancelled[request] = at_token

    def take(self) -> list[FakeDelivery]:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._eventfd)
        if self.automatic:
            self.step()
        ready, self._ready = self._ready, []
        if self.automatic and self.live:
            self._signal()
        return ready

    def step(self, tokens: int = 1) -> None:
        """Every live request gets so many tokens, in one delivery."""
        for request, entry in list(self.live.items()):
            self._deliver(request, entry, tokens)
        if not self.automatic:
            self._signal()

    def fail(self, request: int, reason: str) -> None:
        """Ends a request as a replica or the front would."""
        entry = self.live.pop(request)
        self._ready.append(FakeDelivery(request, entry.emitted, [], reason, entry.emitted, restarts=entry.restarts))
        self._signal()

    def status(self) -> FakeStatus:
        return FakeStatus(0, 0, len(self.live), self.replicas, **self.counts)

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            os.close(self._eventfd)

    def _deliver(self, request: int, entry: Submitted, count: int) -> None:
        sampling, index, made, reason = entry.sampling, entry.emitted, [], None
        for _ in range(count):
            token = next(entry.source)
            made.append(token)
            entry.emitted += 1
            ends = (token in self.eos and not sampling.ignore_eos) or token in sampling.stop_tokens
            if ends and entry.emitted > sampling.min_tokens:
                reason = "stop"
            elif entry.emitted >= sampling.max_tokens:
                reason = "length"
            if reason is not None:
                self.live.pop(request, None)
                break
        logprobs = None
        if sampling.logprobs is not None:
            drawn, top = self.likelier, range(sampling.logprobs)
            logprobs = [(-0.25 - drawn, [(token - drawn + rank, -0.25 - rank) for rank in top]) for token in made]
        self._ready.append(
            FakeDelivery(
                request, index, made, reason, entry.emitted, logprobs, cached_tokens=0, restarts=entry.restarts
            )
        )

    def _signal(self) -> None:
        os.eventfd_write(self._eventfd, 1)
