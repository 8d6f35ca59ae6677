"""What the gateway needs of the core's front, as types.

The real front is `llmscale._core.Front`; tests use a fake with the same shape. The protocols hold no behaviour, cost
nothing at run time and know nothing of HTTP or of text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from llmscale.choice import Delivery

PRIORITIES = ("interactive", "standard", "batch", "background")


class ReplicaStatus(Protocol):
    """One replica as the front sees it."""

    @property
    def node(self) -> str: ...
    @property
    def state(self) -> str:
        """ "starting", "ready", "recovering" or "down"."""

    @property
    def trust(self) -> str:
        """ "trusted", "ejected" while it gets nothing, or "probing" while one request decides."""

    @property
    def ejections(self) -> int: ...
    @property
    def recent_answers(self) -> int: ...
    @property
    def recent_late(self) -> int: ...
    @property
    def recent_failures(self) -> int: ...
    @property
    def running(self) -> int: ...
    @property
    def waiting(self) -> int: ...
    @property
    def free_blocks(self) -> int: ...
    @property
    def total_blocks(self) -> int: ...
    @property
    def steps(self) -> int: ...
    @property
    def worker_restarts(self) -> int: ...
    @property
    def prefix_queries(self) -> int: ...
    @property
    def prefix_hits(self) -> int: ...
    @property
    def offloaded_blocks(self) -> int: ...
    @property
    def restored_blocks(self) -> int: ...
    @property
    def bad_host_blocks(self) -> int: ...
    @property
    def disk_written_blocks(self) -> int: ...
    @property
    def disk_read_blocks(self) -> int: ...
    @property
    def bad_disk_blocks(self) -> int: ...
    @property
    def failed_disk_writes(self) -> int: ...
    @property
    def disk_waits(self) -> int: ...
    @property
    def lost_disk_records(self) -> int: ...
    @property
    def predicted_step_ns(self) -> int: ...
    @property
    def step_error_ns(self) -> int: ...
    @property
    def paced_steps(self) -> int: ...
    @property
    def preemptions(self) -> int: ...
    @property
    def model(self) -> str: ...
    @property
    def weights_digest(self) -> str:
        """In hexadecimal, as the next one."""

    @property
    def tokenizer_digest(self) -> str: ...
    @property
    def numerics(self) -> str:
        """How it computes: kernels, their level, number format, ranks."""

    @property
    def max_sequence_tokens(self) -> int: ...
    @property
    def vocabulary(self) -> int: ...
    @property
    def worker_pid(self) -> int: ...
    @property
    def step_ns(self) -> int: ...
    @property
    def stage_wait_ns(self) -> int: ...


class FrontStatus(Protocol):
    """The front's queue and its replicas."""

    @property
    def queued_requests(self) -> int: ...
    @property
    def queued_tokens(self) -> int: ...
    @property
    def live_requests(self) -> int: ...
    @property
    def numerics_changes(self) -> int: ...
    @property
    def lost_attempts(self) -> int: ...
    @property
    def moved_attempts(self) -> int: ...
    @property
    def stale_frames(self) -> int: ...
    @property
    def stale_rows(self) -> int: ...
    @property
    def known_prefixes(self) -> int: ...
    @property
    def prefix_bytes(self) -> int: ...
    @property
    def prefix_gaps(self) -> int: ...
    @property
    def ejections(self) -> int: ...
    @property
    def failed_probes(self) -> int: ...
    @property
    def spared_replicas(self) -> int: ...
    @property
    def retries(self) -> int: ...
    @property
    def repeated_retries(self) -> int: ...
    @property
    def retries_delayed(self) -> int: ...
    @property
    def hedges(self) -> int: ...
    @property
    def hedge_wins(self) -> int: ...
    @property
    def hedged_tokens(self) -> int: ...
    @property
    def first_attempt_tokens(self) -> int: ...
    @property
    def replicas(self) -> Sequence[ReplicaStatus]: ...


class SamplingFactory(Protocol):
    """`_core.Sampling`: checks every field and raises `InvalidField`."""

    def __call__(
        self,
        *,
        temperature: float,
        top_k: int,
        top_p: float,
        min_p: float,
        repetition_penalty: float,
        presence_penalty: float,
        frequency_penalty: float,
        seed: int | None,
        choice: int,
        logprobs: int | None,
        logit_bias: Sequence[tuple[int, float]],
        max_tokens: int,
        min_tokens: int,
        stop_tokens: Sequence[int],
        ignore_eos: bool,
    ) -> Any: ...


class Front(Protocol):
    """Owns every request's life. Thread-safe, never blocks."""

    def fileno(self) -> int:
        """An eventfd that is readable when `take` has something."""

    def submit(
        self,
        tenant: str,
        model: str,
        prompt: Sequence[int],
        sampling: Any,
        *,
        priority: str = "standard",
        timeout_us: int | None = None,
        detached: bool = False,
    ) -> int:
        """Starts a request. Raises Overloaded, RequestTooLong, UnknownModel, Unavailable or InvalidField."""

    def cancel(self, request: int, at_token: int | None = None) -> None:
        """Ends a request; with `at_token`, only that many output tokens count."""

    def take(self) -> Sequence[Delivery]:
        """Everything that is new, at most one delivery per request."""

    def status(self) -> FrontStatus: ...

    def close(self) -> None: ...
