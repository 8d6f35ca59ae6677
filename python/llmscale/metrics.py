"""Every metric of llmscale: its name, unit and labels in one place.

Names mirror vLLM's with the prefix `llmscale:`, so its dashboards and autoscalers work after a rename. Counters and
histograms that tokens touch are plain lists and integers here (0.3 us for an observation; prometheus-client takes 1 us
and a lock) and become samples at scrape time; gauges of the replicas are read from the front at scrape time. Labels
come from fixed sets only, so no client can add a series. Knows nothing of HTTP beyond route names.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from typing import Final, Protocol

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

TIME_TO_FIRST_TOKEN_BUCKETS: Final = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0,
)  # fmt: skip
INTER_TOKEN_BUCKETS: Final = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0, 20.0,
    40.0, 80.0,
)  # fmt: skip
REQUEST_LATENCY_BUCKETS: Final = (
    0.005, 0.01, 0.05, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0,
    240.0, 480.0,
)  # fmt: skip
FINISH_REASONS: Final = (
    "stop", "length", "abort", "aborted", "deadline_exceeded", "request_poisoned", "not_a_number", "nothing_to_sample",
    "unavailable", "other",
)  # fmt: skip
MAX_TENANT_LABELS: Final = 256
OTHER: Final = "other"


class Histogram:
    """Counts per bucket. `observe` is O(log buckets) and takes no lock: only the event loop writes."""

    __slots__ = ("_bounds", "_counts", "_sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(self._bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        """Adds a value, as often as it was seen."""
        self._counts[bisect_left(self._bounds, value)] += times
        self._sum += value * times

    def samples(self) -> tuple[list[tuple[str, float]], float]:
        """Cumulative counts with their upper bounds, and the sum, as the exposition format wants them."""
        buckets: list[tuple[str, float]] = []
        total = 0
        for bound, count in zip((*map(str, self._bounds), "+Inf"), self._counts, strict=True):
            total += count
            buckets.append((bound, float(total)))
        return buckets, self._sum


class _Timed(Protocol):
    """What a request tells about its times; `last_token_at` is None before the first token."""

    started_at: float
    last_token_at: float | None
    output_tokens: int


class RequestMetrics:
    """What the requests of one model cost and how long they took."""

    __slots__ = (
        "_clock",
        "finished_by_reason",
        "generation_tokens",
        "inter_token_seconds",
        "latency_seconds",
        "model",
        "prompt_tokens",
        "time_to_first_token_seconds",
        "tokens_by_tenant",
    )

    def __init__(self, model: str, tenants: Sequence[str] = (), *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.model = model
        self.prompt_tokens = 0
        self.generation_tokens = 0
        self.time_to_first_token_seconds = Histogram(TIME_TO_FIRST_TOKEN_BUCKETS)
        self.inter_token_seconds = Histogram(INTER_TOKEN_BUCKETS)
        self.latency_seconds = Histogram(REQUEST_LATENCY_BUCKETS)
        self.finished_by_reason = dict.fromkeys(FINISH_REASONS, 0)
        self.tokens_by_tenant = dict.fromkeys((*sorted(tenants)[:MAX_TENANT_LABELS], OTHER), 0)

    def admitted(self, tenant: str, prompt_tokens: int) -> None:
        """A prompt was handed to the front."""
        self.prompt_tokens += prompt_tokens
        self.tokens_by_tenant[tenant if tenant in self.tokens_by_tenant else OTHER] += prompt_tokens

    def tokens(self, request: _Timed, count: int, now: float) -> None:
        """So many tokens of a request have arrived; they share the time since the previous ones."""
        if count <= 0:
            return
        self.generation_tokens += count
        if request.last_token_at is None:
            self.time_to_first_token_seconds.observe(now - request.started_at)
            count -= 1
            request.last_token_at = now
        if count:
            self.inter_token_seconds.observe((now - request.last_token_at) / count, count)
            request.last_token_at = now

    def finished(self, request: _Timed, reason: str) -> None:
        """A request has ended."""
        self.finished_by_reason[reason if reason in self.finished_by_reason else OTHER] += 1
        self.latency_seconds.observe(self._clock() - request.started_at)


class _Replica(Protocol):
    @property
    def node(self) -> str: ...
    @property
    def model(self) -> str: ...
    @property
    def state(self) -> str: ...
    @property
    def trust(self) -> str: ...
    @property
    def ejections(self) -> int: ...
    @property
    def running(self) -> int: ...
    @property
    def waiting(self) -> int: ...
    @property
    def free_blocks(self) -> int: ...
    @property
    def total_blocks(self) -> int: ...
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
    def steps(self) -> int: ...
    @property
    def step_ns(self) -> int: ...
    @property
    def stage_wait_ns(self) -> int: ...


class _Status(Protocol):
    @property
    def queued_requests(self) -> int: ...
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
    def replicas(self) -> Sequence[_Replica]: ...


_Kind = type[GaugeMetricFamily] | type[CounterMetricFamily]


def _used_part(replica: _Replica) -> float:
    used = replica.total_blocks - replica.free_blocks
    return used / replica.total_blocks if replica.total_blocks else 0.0


# Kind, name, meaning and value of every metric of a replica; counters get the end "_total" when they are shown.
_OF_REPLICA: Final[tuple[tuple[_Kind, str, str, Callable[[_Replica], float]], ...]] = (
    (GaugeMetricFamily, "num_requests_running", "Sequences that run", lambda one: one.running),
    (GaugeMetricFamily, "num_requests_waiting", "Sequences that wait on a replica", lambda one: one.waiting),
    (GaugeMetricFamily, "kv_cache_usage_perc", "Used part of the KV blocks, 1 is full", _used_part),
    (GaugeMetricFamily, "replica_ready", "1 while the replica makes progress", lambda one: one.state == "ready"),
    (GaugeMetricFamily, "replica_trusted", "0 while it is left alone or tried", lambda one: one.trust == "trusted"),
    (CounterMetricFamily, "replica_ejections", "Times that it was left alone", lambda one: one.ejections),
    (CounterMetricFamily, "num_preemptions", "Preempted sequences", lambda one: one.preemptions),
    (
        CounterMetricFamily,
        "prefix_cache_queries",
        "Prompt tokens looked up in the cache",
        lambda one: one.prefix_queries,
    ),
    (CounterMetricFamily, "prefix_cache_hits", "Prompt tokens found in the cache", lambda one: one.prefix_hits),
    (CounterMetricFamily, "kv_offloaded_blocks", "KV blocks copied to the host", lambda one: one.offloaded_blocks),
    (CounterMetricFamily, "kv_restored_blocks", "KV blocks copied back from the host", lambda one: one.restored_blocks),
    (CounterMetricFamily, "kv_bad_host_blocks", "Host blocks that were found corrupt", lambda one: one.bad_host_blocks),
    (CounterMetricFamily, "kv_disk_written_blocks", "KV blocks written to disk", lambda one: one.disk_written_blocks),
    (CounterMetricFamily, "kv_disk_read_blocks", "KV blocks read from disk", lambda one: one.disk_read_blocks),
    (CounterMetricFamily, "kv_disk_bad_blocks", "Disk blocks that were found corrupt", lambda one: one.bad_disk_blocks),
    (CounterMetricFamily, "kv_disk_failed_writes", "Writes that the disk refused", lambda one: one.failed_disk_writes),
    (CounterMetricFamily, "kv_disk_waits", "Times a step waited for the disk", lambda one: one.disk_waits),
    (CounterMetricFamily, "kv_disk_lost_records", "Index records not written", lambda one: one.lost_disk_records),
    (CounterMetricFamily, "worker_restarts", "Times a worker process was replaced", lambda one: one.worker_restarts),
    (CounterMetricFamily, "steps", "Steps of the model", lambda one: one.steps),
    (CounterMetricFamily, "step_seconds", "Time that steps took", lambda one: one.step_ns / 1e9),
    (
        CounterMetricFamily,
        "predicted_step_seconds",
        "Time that steps were predicted to take, copies of KV blocks apart",
        lambda one: one.predicted_step_ns / 1e9,
    ),
    (
        CounterMetricFamily,
        "step_prediction_error_seconds",
        "By how much each step took longer or shorter than predicted, added up",
        lambda one: one.step_error_ns / 1e9,
    ),
    (
        CounterMetricFamily,
        "paced_steps",
        "Steps whose prefill was cut for the streams beside",
        lambda one: one.paced_steps,
    ),
    (
        CounterMetricFamily,
        "pipeline_bubble_seconds",
        "Part of it that the last stage waited for the ones before",
        lambda one: one.stage_wait_ns / 1e9,
    ),
)
# What is known of one that cannot be heard; the rest would be a full cache, and counters that fall to 0 and jump back.
_OF_ABSENT: Final = frozenset({"replica_ready", "replica_trusted", "replica_ejections"})
# The same of the front.
_OF_FRONT: Final[tuple[tuple[_Kind, str, str, Callable[[_Status], float]], ...]] = (
    (GaugeMetricFamily, "queued_requests", "Requests that wait in the front", lambda front: front.queued_requests),
    (GaugeMetricFamily, "live_requests", "Requests that are alive", lambda front: front.live_requests),
    (
        CounterMetricFamily,
        "lost_attempts",
        "Attempts lost with a node and made again",
        lambda front: front.lost_attempts,
    ),
    (CounterMetricFamily, "moved_attempts", "Streams moved off a draining node", lambda front: front.moved_attempts),
    (
        CounterMetricFamily,
        "numerics_changes",
        "Streams that went on where numbers are computed otherwise",
        lambda front: front.numerics_changes,
    ),
    (CounterMetricFamily, "stale_frames", "Frames of a lost conversation, dropped", lambda front: front.stale_frames),
    (CounterMetricFamily, "stale_rows", "Tokens of a lost attempt, dropped", lambda front: front.stale_rows),
    (
        GaugeMetricFamily,
        "known_prefixes",
        "Prefixes that some replica is known to hold",
        lambda front: front.known_prefixes,
    ),
    (GaugeMetricFamily, "prefix_bytes", "Memory of what is known of prefix caches", lambda front: front.prefix_bytes),
    (CounterMetricFamily, "prefix_gaps", "Changes of prefix caches that were missed", lambda front: front.prefix_gaps),
    (CounterMetricFamily, "failed_probes", "Times that a replica failed its probe", lambda front: front.failed_probes),
    (
        CounterMetricFamily,
        "spared_replicas",
        "Times that a bad replica was used on, half of its model's others being out",
        lambda front: front.spared_replicas,
    ),
    (CounterMetricFamily, "retries", "Attempts made again after a bad answer", lambda front: front.retries),
    (
        CounterMetricFamily,
        "repeated_retries",
        "Of these, those that the retry budget bounds",
        lambda front: front.repeated_retries,
    ),
    (
        CounterMetricFamily,
        "retries_delayed",
        "Times that an attempt waited for the retry budget",
        lambda front: front.retries_delayed,
    ),
    (CounterMetricFamily, "hedges", "Second attempts beside a late first token", lambda front: front.hedges),
    (CounterMetricFamily, "hedge_wins", "Of these, those that were first after all", lambda front: front.hedge_wins),
    (CounterMetricFamily, "hedged_tokens", "Context tokens of second attempts", lambda front: front.hedged_tokens),
    (
        CounterMetricFamily,
        "first_attempt_tokens",
        "Context tokens of first attempts; 0 without second ones",
        lambda front: front.first_attempt_tokens,
    ),
)


class GatewayMetrics(Collector):
    """Everything that `/metrics` shows. `status` is called once per scrape."""

    def __init__(self, models: Sequence[RequestMetrics], routes: Sequence[str], status: Callable[[], _Status]) -> None:
        self._models = {metrics.model: metrics for metrics in models}
        self._status = status
        self._routes = frozenset(routes)
        self.http_requests: dict[tuple[str, int], int] = {}
        self.evicted_readers = 0
        self.registry = CollectorRegistry()
        self.registry.register(self)

    def of_model(self, name: str) -> RequestMetrics:
        """The metrics of a served model."""
        return self._models[name]

    def http_request(self, route: str, status: int) -> None:
        """A response was sent. Unknown routes share one label."""
        key = (route if route in self._routes else OTHER, status)
        self.http_requests[key] = self.http_requests.get(key, 0) + 1

    def exposition(self) -> bytes:
        """The text that Prometheus scrapes."""
        return generate_latest(self.registry)

    def describe(self) -> Iterator[Metric]:
        """Nothing: registering must not ask the front."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        """One scrape."""
        yield from self._of_requests()
        yield from self._of_replicas()
        requests = CounterMetricFamily("llmscale:http_requests", "HTTP responses", labels=("route", "status"))
        for (route, status), count in sorted(self.http_requests.items()):
            requests.add_metric((route, str(status)), count)
        yield requests
        yield CounterMetricFamily(
            "llmscale:evicted_readers", "Streams ended because their client did not read", value=self.evicted_readers
        )

    def _of_requests(self) -> Iterator[Metric]:
        label = ("model_name",)
        prompt = CounterMetricFamily("llmscale:prompt_tokens", "Prompt tokens", labels=label)
        generation = CounterMetricFamily("llmscale:generation_tokens", "Generated tokens", labels=label)
        success = CounterMetricFamily(
            "llmscale:request_success", "Ended requests by reason", labels=("model_name", "finished_reason")
        )
        tenants = CounterMetricFamily(
            "llmscale:tenant_prompt_tokens", "Prompt tokens by tenant", labels=("model_name", "tenant")
        )
        first = HistogramMetricFamily("llmscale:time_to_first_token_seconds", "Time to the first token", labels=label)
        gap = HistogramMetricFamily("llmscale:inter_token_latency_seconds", "Time between tokens", labels=label)
        latency = HistogramMetricFamily("llmscale:e2e_request_latency_seconds", "Time from start to end", labels=label)
        for name, metrics in self._models.items():
            prompt.add_metric((name,), metrics.prompt_tokens)
            generation.add_metric((name,), metrics.generation_tokens)
            for reason, count in metrics.finished_by_reason.items():
                success.add_metric((name, reason), count)
            for tenant, count in metrics.tokens_by_tenant.items():
                tenants.add_metric((name, tenant), count)
            for family, histogram in (
                (first, metrics.time_to_first_token_seconds),
                (gap, metrics.inter_token_seconds),
                (latency, metrics.latency_seconds),
            ):
                buckets, total = histogram.samples()
                family.add_metric((name,), buckets, total)
        yield from (prompt, generation, success, tenants, first, gap, latency)

    def _of_replicas(self) -> Iterator[Metric]:
        status = self._status()
        for kind, name, meaning, value in _OF_REPLICA:
            family = kind(f"llmscale:{name}", meaning, labels=("model_name", "node"))
            for replica in status.replicas:
                if replica.state == "down" and name not in _OF_ABSENT:
                    continue
                # A node may call its model anything; only names that the operator has given become labels.
                model = replica.model if replica.model in self._models else OTHER
                family.add_metric((model, replica.node), float(value(replica)))
            yield family
        for kind, name, meaning, value_of_front in _OF_FRONT:
            yield kind(f"llmscale:front_{name}", meaning, value=float(value_of_front(status)))
