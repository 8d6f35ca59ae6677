//! A first token that is late is asked for twice: the first attempt to give one wins, the other is aborted and costs nobody
//! anything, and neither a busy pool nor a request that was in a crash is asked twice.

mod common;

use common::{Bench, STOP, new_request};
use llmscale_front::{EndReason, FrontEvent, FrontOptions, HedgeOptions, ReplicaState, ToReplica};
use llmscale_types::{Attempt, Duration, FinishReason, Refusal, RequestId, Time};

const HEDGING: HedgeOptions = HedgeOptions {
    permille: 1_000,
    max_saved_tokens: 1_000,
    least_answers: 4,
    least_wait: Duration::from_millis(20),
    max_busy_permille: 850,
};

impl Bench {
    /// A front that has seen enough first tokens in time, with so many idle replicas.
    fn hedging(replicas: u32, options: HedgeOptions) -> Self {
        let mut bench = Self::new(FrontOptions { hedging: Some(options), ..FrontOptions::default() });
        (0..replicas).for_each(|replica| bench.up(replica));
        for _ in 0..HEDGING.least_answers {
            let id = bench.take(new_request(1));
            let (replica, _) = bench.submissions().remove(0);
            bench.token(replica, id, 1, 0, 0);
            bench.end(replica, id, 1, FinishReason::Length, 1);
        }
        bench.sent();
        bench
    }

    /// A request whose first token is late by now. Returns it with its first and its second place.
    fn race(&mut self) -> (RequestId, u32, u32) {
        let id = self.take(new_request(4));
        let (first, _) = self.submissions().remove(0);
        self.pass(Duration::from_millis(1_000));
        let second = self.submissions();
        assert_eq!(second.len(), 1, "one attempt beside the first");
        let (place, submission) = &second[0];
        assert_eq!((submission.key.request, submission.key.attempt), (id, Attempt(2)));
        assert_ne!(*place, first);
        assert!(self.front.is_hedged(id));
        (id, first, *place)
    }

    fn aborts(&mut self) -> Vec<(u32, Attempt)> {
        let aborts = self.sent().into_iter().filter_map(|(replica, message)| match message {
            ToReplica::Abort { attempt, .. } => Some((replica, attempt)),
            ToReplica::Submit(_) | ToReplica::Recall { .. } | ToReplica::KvAsk { .. } => None,
        });
        aborts.collect()
    }

    fn loads(&self) -> Vec<u32> {
        self.front.status(self.now).replicas.iter().map(|replica| replica.load.sequences).collect()
    }
}

#[test]
fn the_second_attempt_wins_with_its_first_token_and_the_first_is_aborted_at_once() {
    let mut bench = Bench::hedging(2, HEDGING);
    let (id, first, second) = bench.race();
    bench.token(second, id, 2, 0, 50);
    assert_eq!(bench.aborts(), [(first, Attempt(1))]);
    bench.token(first, id, 1, 0, 50);
    bench.token(second, id, 2, 1, 51);
    bench.end(second, id, 2, FinishReason::Stop, 2);
    assert_eq!(bench.tokens(id), [50, 51]);
    let (reason, output_tokens, _, restarts) = bench.ends[&id];
    assert_eq!((reason, output_tokens, restarts), (STOP, 2, 0), "the loser is not paid for");
    let counters = bench.front.counters();
    assert_eq!((counters.hedges, counters.hedge_wins, counters.stale_rows), (1, 1, 1));
    assert_eq!(bench.loads(), [0, 0]);
}

#[test]
fn the_first_attempt_wins_when_it_speaks_first() {
    let mut bench = Bench::hedging(2, HEDGING);
    let (id, first, second) = bench.race();
    bench.token(first, id, 1, 0, 50);
    assert_eq!(bench.aborts(), [(second, Attempt(2))]);
    bench.token(second, id, 2, 0, 50);
    assert_eq!((bench.tokens(id), bench.front.counters().hedge_wins), (&[50][..], 0));
}

#[test]
fn either_attempt_goes_on_alone_when_the_node_of_the_other_dies() {
    for dies_first in [true, false] {
        let mut bench = Bench::hedging(2, HEDGING);
        let (id, first, second) = bench.race();
        let (dead, left, attempt) = if dies_first { (first, second, 2) } else { (second, first, 1) };
        bench.down(dead);
        assert!(bench.sent().is_empty(), "nothing has to be sent again");
        bench.token(left, id, attempt, 0, 50);
        assert_eq!(bench.tokens(id), [50]);
    }
}

#[test]
fn either_attempt_goes_on_alone_when_the_other_is_given_back() {
    for (attempt, refusal) in
        [(1, Refusal::Draining), (2, Refusal::Draining), (1, Refusal::Duplicate), (2, Refusal::Duplicate)]
    {
        let mut bench = Bench::hedging(2, HEDGING);
        let (id, first, second) = bench.race();
        let (back, left) = if attempt == 1 { (first, second) } else { (second, first) };
        bench.give_back(back, id, attempt, Some(refusal));
        assert!(!bench.front.is_hedged(id));
        bench.token(left, id, 3 - attempt, 0, 50);
        assert_eq!(bench.tokens(id), [50], "{refusal:?} of attempt {attempt}");
    }
}

#[test]
fn both_attempts_are_aborted_when_the_client_leaves() {
    let mut bench = Bench::hedging(2, HEDGING);
    let (id, first, second) = bench.race();
    bench.event(FrontEvent::ClientGone { request: id });
    let mut aborts = bench.aborts();
    aborts.sort_unstable_by_key(|&(_, attempt)| attempt);
    assert_eq!(aborts, [(first, Attempt(1)), (second, Attempt(2))]);
    assert_eq!(bench.loads(), [0, 0]);
}

#[test]
fn an_end_without_tokens_ends_the_race_too() {
    let mut bench = Bench::hedging(2, HEDGING);
    let (id, first, second) = bench.race();
    bench.end(second, id, 2, FinishReason::Poisoned, 0);
    assert_eq!(bench.aborts(), [(first, Attempt(1))]);
    assert_eq!(bench.reason(id), Some(EndReason::Finished(FinishReason::Poisoned)));
}

#[test]
fn a_worker_that_dies_ends_the_race_because_a_prompt_that_kills_would_kill_twice() {
    let mut bench = Bench::hedging(2, HEDGING);
    let (id, first, second) = bench.race();
    bench.status(first, ReplicaState::Recovering);
    assert!(bench.aborts().contains(&(second, Attempt(2))));
    assert!(!bench.front.is_hedged(id));
    bench.pass(Duration::from_millis(10_000));
    assert!(!bench.front.is_hedged(id), "nor is it asked for twice later");
}

fn late_request_is_hedged(mut bench: Bench) -> bool {
    let id = bench.take(new_request(4));
    bench.pass(Duration::from_millis(1_000));
    bench.front.is_hedged(id)
}

#[test]
fn a_pool_of_one_a_busy_one_and_one_that_is_not_known_yet_are_not_asked_twice() {
    assert!(late_request_is_hedged(Bench::hedging(2, HEDGING)));
    assert!(!late_request_is_hedged(Bench::hedging(1, HEDGING)));
    assert!(!late_request_is_hedged(Bench::hedging(2, HedgeOptions { max_busy_permille: 100, ..HEDGING })));
    assert!(!late_request_is_hedged(Bench::hedging(2, HedgeOptions { least_answers: 5, ..HEDGING })));
}

#[test]
fn nothing_is_asked_for_twice_before_the_slowest_twentieth_would_have_come() {
    let mut bench = Bench::hedging(2, HEDGING);
    let id = bench.take(new_request(4));
    bench.submissions();
    let at = bench.wake_at.expect("it is woken for the second attempt");
    assert!(at.since(bench.now) >= HEDGING.least_wait);
    bench.now = Time(at.0 - 1);
    bench.event(FrontEvent::Tick);
    assert!(!bench.front.is_hedged(id));
    bench.now = at;
    bench.event(FrontEvent::Tick);
    assert!(bench.front.is_hedged(id));
}

#[test]
fn at_most_a_twentieth_of_all_prompt_tokens_is_sent_twice() {
    let options = HedgeOptions { permille: 50, ..HEDGING };
    let mut bench = Bench::hedging(2, options);
    let mut hedged = 0;
    for _ in 0..200 {
        let id = bench.take(new_request(4));
        bench.pass(Duration::from_millis(1_000));
        hedged += u32::from(bench.front.is_hedged(id));
        bench.event(FrontEvent::ClientGone { request: id });
        bench.sent();
    }
    // 204 prompts of 3 tokens.
    assert_eq!(hedged, 10);
    let counters = bench.front.counters();
    assert_eq!((counters.hedged_tokens, counters.first_attempt_tokens), (30, 612));
}

#[test]
fn without_options_nothing_is_asked_for_twice() {
    let mut bench = Bench::new(FrontOptions { hedging: None, ..FrontOptions::default() });
    bench.up(0);
    bench.up(1);
    let id = bench.take(new_request(4));
    bench.pass(Duration::from_millis(60_000));
    assert!(!bench.front.is_hedged(id));
}
