//! The bounds that all models share: who is refused for what waits, and what a refused client is told.

mod common;

use common::{Bench, new_request, offer, row};
use llmscale_front::{
    FrontOptions, ModelKey, NewRequest, Offer, ReplicaFrame, ReplicaLimits, ReplicaState, SubmitError,
};
use llmscale_types::error::QueueUnit;
use llmscale_types::{Duration, FinishReason, FrontLimits, Refusal, StepId};

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

/// One replica whose sequences may be long, and the time of a prompt that it has shown: 50 us for each token, 100 ns for each
/// token before it.
fn taught(limits: FrontLimits) -> Bench {
    let mut bench = Bench::new(FrontOptions { limits, ..FrontOptions::default() });
    let usual = offer(100);
    let limits = ReplicaLimits { max_sequence_tokens: 8_000, ..usual.limits.clone() };
    bench.up_with(0, Offer { limits, ..usual });
    let stream = bench.take(new_request(1_000));
    for step in 0..100 {
        let tokens = 100 + u64::from(step) * 37 % 1_000;
        let prompt = bench.take(NewRequest { prompt: vec![1; tokens as usize], ..new_request(1) });
        bench.now = bench.now + Duration(2_000 + 50 * tokens + tokens * tokens / 20);
        let mut outputs = row(stream, 1, step, 7);
        let first = row(prompt, 1, 0, 7);
        outputs.step = StepId(u64::from(step));
        outputs.requests.extend(first.requests);
        outputs.attempts.extend(first.attempts);
        outputs.indexes.extend(first.indexes);
        outputs.tokens.extend(first.tokens);
        bench.frame(0, ReplicaFrame::Outputs(outputs));
        bench.end(0, prompt, 1, FinishReason::Length, 1);
    }
    bench.end(0, stream, 1, FinishReason::Stop, 100);
    bench
}

fn long_prompt() -> NewRequest {
    NewRequest { prompt: vec![1; 1_000], ..new_request(1) }
}

#[test]
fn room_is_predicted_for_one_request_with_each_prompt_priced_by_itself() {
    for most in [2, 40] {
        let mut bench = taught(FrontLimits { max_queued_requests: most, ..small() });
        // The first one is begun, the others wait; a prompt takes 100 ms.
        bench.take_many(most as usize + 1, &long_prompt());
        let (unit, retry_after) = bench.refused(long_prompt());
        assert_eq!(unit, QueueUnit::Requests);
        assert!((150_000..250_000).contains(&retry_after.0), "{retry_after:?} until one of {most} has gone");
    }
}

#[test]
fn room_for_a_prompt_is_predicted_for_the_tokens_that_it_needs() {
    let mut bench =
        taught(FrontLimits { max_queued_tokens: 20_000, ..FrontLimits { max_queued_requests: 99, ..small() } });
    bench.take_many(21, &long_prompt());
    let retry_after = |bench: &mut Bench, tokens| {
        let (unit, retry_after) = bench.refused(NewRequest { prompt: vec![1; tokens], ..new_request(1) });
        assert_eq!(unit, QueueUnit::Tokens);
        retry_after.0 / 1_000
    };
    let (one, five) = (retry_after(&mut bench, 1_000), retry_after(&mut bench, 5_000));
    assert!((150..250).contains(&one), "{one} ms");
    assert!((500..750).contains(&five), "{five} ms");
}

#[test]
fn room_among_live_requests_is_predicted_for_the_first_that_ends() {
    let mut bench = Bench::new(FrontOptions {
        limits: FrontLimits { max_live_requests: 4, ..FrontLimits::default() },
        ..FrontOptions::default()
    });
    bench.up(0);
    let running = bench.take_many(4, &new_request(60));
    for request in running {
        bench.token(0, request, 1, 0, 7);
    }
    let (unit, retry_after) = bench.refused(new_request(60));
    assert_eq!(unit, QueueUnit::LiveRequests);
    // Four times 59 tokens, side by side in steps of about 2.2 ms, are 130 ms; one in four of them.
    assert!((30_000..40_000).contains(&retry_after.0), "{retry_after:?}");
}
