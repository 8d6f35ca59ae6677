//! Streams whose replica lives but has no worker for long go on elsewhere.

mod common;

use common::{Bench, new_request, offer};
use llmscale_fleet::{Fleet, LeastWork, Need, Offer, Policy};
use llmscale_front::{Front, FrontEvent, FrontOptions, ReplicaFrame, ReplicaState, SubmitError, ToReplica};
use llmscale_types::{Attempt, Duration, Refusal, ReplicaId};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

#[test]
fn streams_leave_a_replica_that_is_without_a_worker_for_longer_than_a_spare_takes() {
    let mut bench = Bench::with_replicas(2);
    let stream = bench.take(new_request(8));
    let (first, _) = bench.submissions().remove(0);
    let other = 1 - first;
    bench.token(first, stream, 1, 0, 50);
    bench.status(first, ReplicaState::Recovering);
    bench.pass(Duration::from_millis(400));
    bench.status(first, ReplicaState::Recovering);
    assert!(bench.sent().is_empty(), "a spare may be on its way");
    bench.pass(Duration::from_millis(100));
    bench.status(first, ReplicaState::Recovering);
    bench.status(first, ReplicaState::Recovering);
    assert_eq!(bench.sent(), [(first, ToReplica::Recall { request: stream, attempt: Attempt(1) })], "asked once");
    let back = ReplicaFrame::GiveBack { request: stream, attempt: Attempt(1), refusal: None, suspect: true };
    bench.frame(first, back);
    let (replica, submission) = bench.submissions().remove(0);
    assert_eq!((replica, submission.suspect, submission.context.last()), (other, true, Some(&50)));
    assert_eq!(bench.front.counters().moved, 1);
    bench.token(other, stream, 2, 1, 51);
    bench.status(first, ReplicaState::Ready);
    bench.down(other);
    assert!(!bench.submissions().remove(0).1.suspect, "a token came: its whole context went through a model");
}

#[test]
fn a_stream_whose_worker_is_back_may_be_asked_for_again_after_the_next_death() {
    let mut bench = Bench::with_replicas(2);
    let stream = bench.take(new_request(8));
    let (first, _) = bench.submissions().remove(0);
    bench.token(first, stream, 1, 0, 50);
    let recall = [(first, ToReplica::Recall { request: stream, attempt: Attempt(1) })];
    for token in 1..3 {
        bench.status(first, ReplicaState::Recovering);
        bench.pass(Duration::from_millis(600));
        bench.status(first, ReplicaState::Recovering);
        assert_eq!(bench.sent(), recall);
        // It had a place on the next worker by then: nothing is answered, and tokens go on.
        bench.status(first, ReplicaState::Ready);
        bench.token(first, stream, 1, token, 50 + token);
    }
    assert_eq!(bench.tokens(stream), [50, 51, 52]);
}

/// Of a replica that takes short sequences only.
fn narrow(node: u64) -> Offer {
    let offer = offer(node);
    let limits = llmscale_fleet::ReplicaLimits { max_sequence_tokens: 16, ..offer.limits.clone() };
    Offer { limits, ..offer }
}

#[test]
fn who_needs_a_replica_that_is_without_a_worker_or_full_keeps_nobody_waiting_for_a_narrower_one() {
    let mut bench = Bench::with_replicas(1);
    bench.up_with(1, narrow(2));
    bench.status(0, ReplicaState::Recovering);
    let long = bench.take(new_request(40));
    let short = bench.take(new_request(8));
    let placed: Vec<_> = bench.submissions().into_iter().map(|(replica, sent)| (replica, sent.key.request)).collect();
    assert_eq!(placed, [(1, short)]);
    // What comes later does not pass it where it can go itself.
    let later = bench.take_many(12, &new_request(8));
    let placed = bench.submissions().len();
    bench.status(0, ReplicaState::Ready);
    let first = bench.submissions().remove(0);
    assert_eq!((first.0, first.1.key.request), (0, long));
    assert!(placed < later.len(), "the narrow one is full");
}

#[test]
fn who_needs_a_replica_that_is_gone_keeps_nobody_waiting_and_is_placed_when_it_is_back() {
    let mut bench = Bench::with_replicas(1);
    bench.up_with(1, narrow(2));
    let long = bench.take(new_request(40));
    assert_eq!(bench.submissions().remove(0).0, 0, "the other one is too narrow");
    bench.down(0);
    let short = bench.take(new_request(8));
    let placed: Vec<_> = bench.submissions().into_iter().map(|(replica, sent)| (replica, sent.key.request)).collect();
    assert_eq!(placed, [(1, short)]);
    let refused = bench.submit(new_request(40));
    let limit = Refusal::TooLong { needed: 43, limit: 16 };
    assert!(matches!(refused, Err(SubmitError::Refused(given)) if given == limit), "{refused:?}");
    bench.up(0);
    let placed: Vec<_> = bench.submissions().into_iter().map(|(replica, sent)| (replica, sent.key.request)).collect();
    assert_eq!(placed, [(0, long)]);
}

/// Counts the choices of the usual policy.
#[derive(Debug, Default)]
struct Counting(Arc<AtomicU64>);

impl Policy for Counting {
    fn choose(&self, fleet: &Fleet, need: &Need) -> Option<ReplicaId> {
        self.0.fetch_add(1, Ordering::Relaxed);
        LeastWork.choose(fleet, need)
    }
}

#[test]
fn readers_that_catch_up_make_nobody_look_for_places() {
    let counting = Counting::default();
    let choices = Arc::clone(&counting.0);
    let mut bench = Bench::with_replicas(0);
    bench.front = Front::with_policy(FrontOptions::default(), Box::new(counting)).expect("the options are sound");
    bench.up(0);
    let requests = bench.take_many(20, &new_request(8));
    assert!(bench.front.status(bench.now).queued_requests > 0);
    let before = choices.load(Ordering::Relaxed);
    for request in requests {
        bench.event(FrontEvent::Read { request, up_to_index: 0 });
    }
    assert_eq!(choices.load(Ordering::Relaxed), before);
}
