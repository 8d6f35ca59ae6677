//! Models that nobody serves any more: how long their requests wait, for whom, and how they end.

mod common;

use common::{Bench, new_request, offer};
use llmscale_front::{EndReason, ReplicaState, SubmitError, ToReplica};
use llmscale_types::{Attempt, Duration};

#[test]
fn without_replicas_for_too_long_waiting_requests_end_and_new_ones_are_refused() {
    let mut bench = Bench::with_replicas(1);
    let first = bench.take(new_request(4));
    bench.down(0);
    let second = bench.take(new_request(4));
    assert_eq!(bench.wake_at, Some(bench.now + Duration::from_millis(60_000)));
    bench.pass(Duration::from_millis(59_999));
    assert_eq!(bench.ends.len(), 0);
    bench.pass(Duration::from_millis(1));
    assert_eq!(bench.reason(first), Some(EndReason::Unavailable));
    assert_eq!(bench.reason(second), Some(EndReason::Unavailable));
    let error = bench.submit(new_request(4)).expect_err("nobody is there");
    assert_eq!(error, SubmitError::Unavailable { model: "tiny".into() });
    bench.up_with(0, offer(200));
    bench.take(new_request(4));
}

#[test]
fn without_a_worker_for_too_long_what_has_not_begun_ends_and_new_requests_are_refused() {
    let mut bench = Bench::with_replicas(1);
    let stream = bench.take(new_request(4));
    bench.token(0, stream, 1, 0, 41);
    let unbegun = bench.take(new_request(4));
    bench.status(0, ReplicaState::Recovering);
    let waiting = bench.take(new_request(4));
    bench.sent();
    for _ in 0..59 {
        bench.pass(Duration::from_millis(1_000));
        bench.status(0, ReplicaState::Recovering);
    }
    assert_eq!(bench.ends.len(), 0);
    bench.pass(Duration::from_millis(1_000));
    for request in [unbegun, waiting] {
        assert_eq!(bench.reason(request), Some(EndReason::Unavailable));
    }
    assert_eq!(bench.sent(), [(0, ToReplica::Abort { request: unbegun, attempt: Attempt(1), at_token: None })]);
    let error = bench.submit(new_request(4)).expect_err("its worker is not back");
    assert_eq!(error, SubmitError::Unavailable { model: "tiny".into() });
    // The stream goes on with the next worker, and so do new requests.
    bench.status(0, ReplicaState::Ready);
    bench.token(0, stream, 1, 1, 42);
    assert_eq!(bench.tokens(stream), [41, 42]);
    bench.take(new_request(4));
    assert_eq!(bench.submissions().len(), 1);
}

#[test]
fn a_replica_that_starts_or_drains_is_waited_for_and_the_clock_begins_anew_behind_it() {
    for state in [ReplicaState::Starting, ReplicaState::Draining] {
        let mut bench = Bench::with_replicas(1);
        bench.status(0, ReplicaState::Recovering);
        let waiting = bench.take(new_request(4));
        bench.pass(Duration::from_millis(59_000));
        bench.status(0, state);
        bench.pass(Duration::from_millis(300_000));
        assert_eq!(bench.reason(waiting), None);
        bench.status(0, ReplicaState::Recovering);
        bench.pass(Duration::from_millis(59_999));
        assert_eq!(bench.reason(waiting), None);
        bench.pass(Duration::from_millis(1));
        assert_eq!(bench.reason(waiting), Some(EndReason::Unavailable));
    }
}

#[test]
fn what_comes_back_from_a_replica_that_was_given_up_waits_no_longer_than_others() {
    let mut bench = Bench::with_replicas(1);
    let stream = bench.take(new_request(4));
    bench.token(0, stream, 1, 0, 41);
    bench.status(0, ReplicaState::Recovering);
    bench.pass(Duration::from_millis(60_000));
    assert_eq!(bench.reason(stream), None);
    bench.give_back(0, stream, 1, None);
    bench.pass(Duration::from_millis(59_999));
    assert_eq!(bench.reason(stream), None);
    bench.pass(Duration::from_millis(1));
    assert_eq!(bench.reason(stream), Some(EndReason::Unavailable));
}
