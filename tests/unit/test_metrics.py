"""Metrics are what prometheus-client's own would be, at a fraction of the cost on the token path."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry
from prometheus_client import Histogram as Reference
from prometheus_client.parser import text_string_to_metric_families

from llmscale.metrics import OTHER, GatewayMetrics, Histogram, RequestMetrics
from tests.fakes.fake_front import FakeReplica, FakeStatus

BOUNDS = (0.1, 0.5, 2.0)


@dataclass
class Timed:
    started_at: float = 0.0
    last_token_at: float | None = None
    output_tokens: int = 0


@given(st.lists(st.tuples(st.sampled_from([0.0, 0.1, 0.3, 0.5, 2.0, 7.0]), st.integers(1, 4)), max_size=20))
def test_a_histogram_counts_as_the_reference_does(observed: list[tuple[float, int]]) -> None:
    ours, reference = Histogram(BOUNDS), Reference("x", "x", buckets=BOUNDS, registry=CollectorRegistry())
    for value, times in observed:
        ours.observe(value, times)
        for _ in range(times):
            reference.observe(value)
    [family] = reference.collect()
    expected = [sample.value for sample in family.samples if sample.name == "x_bucket"]
    buckets, total = ours.samples()
    assert [count for _, count in buckets] == expected
    assert abs(total - next(sample.value for sample in family.samples if sample.name == "x_sum")) < 1e-9


def test_tokens_of_one_wake_up_share_the_time_since_the_last_one() -> None:
    metrics = RequestMetrics("tiny", clock=lambda: 10.0)
    request = Timed(started_at=1.0)
    metrics.tokens(request, 1, 1.5)
    metrics.tokens(request, 4, 3.5)
    metrics.tokens(request, 0, 9.0)
    first, first_sum = metrics.time_to_first_token_seconds.samples()
    gaps, gaps_sum = metrics.inter_token_seconds.samples()
    assert (first[-1][1], first_sum) == (1, 0.5)
    assert (gaps[-1][1], gaps_sum) == (4, 2.0)
    assert metrics.generation_tokens == 5


def test_unknown_tenants_reasons_and_routes_share_one_label() -> None:
    metrics = RequestMetrics("tiny", ["acme"])
    gateway = GatewayMetrics([metrics], ["/v1/models"], lambda: FakeStatus(0, 0, 0, []))
    for number in range(100):
        metrics.admitted(f"tenant-{number}", 1)
        metrics.finished(Timed(), f"reason-{number}")
        gateway.http_request(f"/path-{number}", 404)
    metrics.admitted("acme", 7)
    assert metrics.tokens_by_tenant == {"acme": 7, OTHER: 100}
    assert metrics.finished_by_reason[OTHER] == 100
    assert gateway.http_requests == {(OTHER, 404): 100}


def test_the_exposition_is_read_by_the_reference_parser() -> None:
    replica = FakeReplica(free_blocks=32, total_blocks=128, running=3, waiting=2, preemptions=4, prefix_hits=5)
    gateway = GatewayMetrics([RequestMetrics("tiny")], [], lambda: FakeStatus(6, 0, 9, [replica], stale_frames=7))
    families = {family.name: family for family in text_string_to_metric_families(gateway.exposition().decode())}
    values = {name: family.samples[0].value for name, family in families.items() if family.samples}
    assert values["llmscale:num_requests_running"] == 3
    assert values["llmscale:num_requests_waiting"] == 2
    assert values["llmscale:kv_cache_usage_perc"] == 0.75
    assert values["llmscale:num_preemptions"] == 4
    assert values["llmscale:prefix_cache_hits"] == 5
    assert values["llmscale:front_queued_requests"] == 6
    assert values["llmscale:front_stale_frames"] == 7
    assert families["llmscale:time_to_first_token_seconds"].type == "histogram"


def test_a_replica_that_is_down_has_no_figures_but_that_it_is() -> None:
    # As the front says it: sizes are known since it was met, the rest is not.
    down = FakeReplica(node="b", state="down", free_blocks=0, total_blocks=128)
    status = FakeStatus(0, 0, 0, [FakeReplica(node="a", steps=9), down])
    gateway = GatewayMetrics([RequestMetrics("tiny")], [], lambda: status)
    seen: dict[str, dict[str, float]] = {}
    for family in text_string_to_metric_families(gateway.exposition().decode()):
        for sample in family.samples:
            seen.setdefault(sample.labels.get("node", ""), {})[sample.name] = sample.value
    assert seen["b"] == {
        "llmscale:replica_ready": 0,
        "llmscale:replica_trusted": 1,
        "llmscale:replica_ejections_total": 0,
    }
    assert (seen["a"]["llmscale:replica_ready"], seen["a"]["llmscale:steps_total"]) == (1, 9)


def test_metrics_tell_which_replica_is_left_alone_and_what_second_attempts_cost() -> None:
    replicas = [FakeReplica(node="a"), FakeReplica(node="b", trust="ejected", ejections=3)]
    replicas += [FakeReplica(node="c", trust="probing", ejections=1)]
    counts = {"failed_probes": 2, "retries": 9, "repeated_retries": 4, "retries_delayed": 5, "spared_replicas": 6}
    status = FakeStatus(
        0, 0, 0, replicas, hedges=7, hedge_wins=8, hedged_tokens=90, first_attempt_tokens=1_900, **counts
    )
    gateway = GatewayMetrics([RequestMetrics("tiny")], [], lambda: status)
    families = {family.name: family for family in text_string_to_metric_families(gateway.exposition().decode())}

    def by_node(name: str) -> dict[str, float]:
        return {sample.labels["node"]: sample.value for sample in families[f"llmscale:{name}"].samples}

    assert by_node("replica_trusted") == {"a": 1, "b": 0, "c": 0}
    assert by_node("replica_ejections") == {"a": 0, "b": 3, "c": 1}
    hedging = {"hedges": 7, "hedge_wins": 8, "hedged_tokens": 90, "first_attempt_tokens": 1_900}
    for name, count in {**counts, **hedging}.items():
        [sample] = families[f"llmscale:front_{name}"].samples
        assert (sample.name, sample.value) == (f"llmscale:front_{name}_total", count)
