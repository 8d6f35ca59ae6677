//! The bounds that all models share: who is refused for what waits, and what a refused client is told.

mod common;

use common::{Bench, new_request, offer};
use llmscale_front::{FrontOptions, ModelKey, NewRequest, Offer, ReplicaLimits, ReplicaState, SubmitError};
use llmscale_types::error::QueueUnit;
use llmscale_types::{Duration, FrontLimits, Refusal};

/// Two requests may wait, and a replica gets what it can begin within 20 ms.
fn small() -> FrontLimits {
    FrontLimits { max_queued_requests: 2, look_ahead: Duration::from_millis(20), ..FrontLimits::default() }
}

/// Replica 0 runs "tiny", replica 1 "mini".
fn two_models(limits: FrontLimits) -> Bench {
    let mut bench = Bench::new(FrontOptions { limits, ..FrontOptions::default() });
    bench.up(0);
    let other = offer(101);
    bench.up_with(1, Offer { model: ModelKey { name: "mini".into(), ..other.model }, ..other });
    bench
}

fn mini(max_tokens: u32) -> NewRequest {
    NewRequest { model: "mini".into(), ..new_request(max_tokens) }
}

impl Bench {
    /// What counts as too much, and how long the client is told to wait.
    fn refused(&mut self, new: NewRequest) -> (QueueUnit, Duration) {
        match self.submit(new) {
            Err(SubmitError::Refused(Refusal::QueueFull { unit, retry_after, .. })) => (unit, retry_after),
            other => panic!("there is no room: {other:?}"),
        }
    }

    fn placed(&mut self) -> Vec<u32> {
        self.submissions().into_iter().map(|(replica, _)| replica).collect()
    }
}

#[test]
fn what_waits_for_a_dead_model_refuses_nobody_whose_model_has_room() {
    let mut bench = two_models(small());
    bench.status(0, ReplicaState::Recovering);
    bench.take_many(2, &new_request(60));
    assert_eq!(bench.refused(new_request(60)).0, QueueUnit::Requests);
    bench.take_many(4, &mini(60));
    assert_eq!(bench.placed(), [1; 4]);
    // The next one would wait, and all that waits is bounded together. Its own pool makes no room, and nobody knows
    // when the other one will.
    assert_eq!(bench.refused(mini(60)), (QueueUnit::Requests, Duration::from_millis(5_000)));
    assert_eq!(bench.front.status(bench.now).queued_requests, 2);
}

#[test]
fn tokens_that_wait_for_a_dead_model_refuse_nobody_whose_model_has_room() {
    let mut bench = two_models(FrontLimits { max_queued_tokens: 5, ..small() });
    bench.status(0, ReplicaState::Recovering);
    bench.take(new_request(60));
    assert_eq!(bench.refused(new_request(60)).0, QueueUnit::Tokens);
    bench.take_many(4, &mini(60));
    assert_eq!(bench.refused(mini(60)).0, QueueUnit::Tokens);
}

#[test]
fn above_the_bound_nobody_is_overtaken_who_could_go() {
    let mut bench = Bench::new(FrontOptions { limits: small(), ..FrontOptions::default() });
    bench.up(0);
    let narrow = offer(101);
    let limits = ReplicaLimits { max_sequence_tokens: 16, ..narrow.limits.clone() };
    bench.up_with(1, Offer { limits, ..narrow });
    bench.status(0, ReplicaState::Recovering);
    // They need the wide replica, which is without a worker.
    bench.take_many(2, &new_request(40));
    bench.take_many(8, &new_request(8));
    assert_eq!(bench.placed(), [1; 8]);
    bench.refused(new_request(8));
    assert_eq!(bench.front.status(bench.now).queued_requests, 2);
}

#[test]
fn who_has_to_wait_is_told_when_those_who_fill_the_queue_will_have_left_room() {
    let mut bench = two_models(small());
    bench.take_many(6, &new_request(60));
    bench.take_many(4, &mini(60));
    let (_, own) = bench.refused(new_request(60));
    let (_, others) = bench.refused(mini(60));
    assert_eq!(own, others);
    assert!(own.0 > 10_000, "{own:?}");
}
