//! What replicas tell of their prefix caches decides where prompts go, as far as it is known.

mod common;

use common::{Bench, new_request, offer};
use llmscale_front::{FrontEvent, FrontOptions, NewRequest, ReplicaFrame, ReplicaState};
use llmscale_types::{Duration, FinishReason, KvEvent, PrefixKey, ReplicaId, Time};
use std::sync::Arc;

const KEYS: u64 = 4;

/// A prompt with names; different seeds have nothing in common.
fn named(seed: u64) -> NewRequest {
    let prefix: Arc<[PrefixKey]> = keys(seed).into();
    NewRequest { prompt: vec![5; KEYS as usize * PrefixKey::TOKENS as usize + 1], prefix, ..new_request(2) }
}

/// The index tells keys apart by their upper bits.
fn keys(seed: u64) -> Vec<PrefixKey> {
    (1..=KEYS).map(|at| PrefixKey((seed * 100 + at) << 40 | at)).collect()
}

/// Replicas with room for long prompts.
fn bench(replicas: u32) -> Bench {
    let mut bench = Bench::new(FrontOptions::default());
    for replica in 0..replicas {
        let mut large = offer(100 + u64::from(replica));
        large.limits.max_sequence_tokens = 4_096;
        bench.event(FrontEvent::ReplicaUp { replica: ReplicaId(replica), offer: Box::new(large) });
    }
    bench
}

fn changes(bench: &mut Bench, replica: u32, number: u64, events: Vec<KvEvent>) {
    bench.frame(replica, ReplicaFrame::KvChanges { number, events });
}

/// Runs a request to its end and returns where it went.
fn run(bench: &mut Bench, new: NewRequest) -> u32 {
    let request = bench.take(new);
    let (replica, submission) = bench.submissions().remove(0);
    let attempt = submission.key.attempt.0;
    bench.now = Time(bench.now.0 + 20_000);
    bench.token(replica, request, attempt, 0, 41);
    bench.token(replica, request, attempt, 1, 42);
    bench.end(replica, request, attempt, FinishReason::Length, 2);
    replica
}

#[test]
fn every_replica_is_asked_what_it_holds_with_its_first_report() {
    let mut bench = bench(3);
    assert!(bench.asks.is_empty());
    for replica in 0..3 {
        bench.status(replica, ReplicaState::Ready);
        bench.status(replica, ReplicaState::Ready);
    }
    assert_eq!(std::mem::take(&mut bench.asks), [(0, 0), (1, 0), (2, 0)]);
    bench.down(1);
    bench.up(1);
    bench.status(1, ReplicaState::Ready);
    assert_eq!(bench.asks, [(1, 0)]);
}

#[test]
fn a_front_without_an_index_asks_nobody() {
    let mut bench = Bench::new(FrontOptions { prefixes: None, ..FrontOptions::default() });
    bench.up(0);
    bench.status(0, ReplicaState::Ready);
    assert!(bench.asks.is_empty());
    assert_eq!(bench.front.block_tokens_for_names("tiny"), None);
}

#[test]
fn prompts_go_where_their_prefix_is_and_away_again_when_it_is_given_up() {
    let mut bench = bench(8);
    for replica in 0..8 {
        bench.frame(replica, ReplicaFrame::KvSnapshot { number: 1, keys: keys(u64::from(replica)) });
    }
    // Before speeds are known nothing is predicted to be saved.
    for seed in 100..116 {
        run(&mut bench, named(seed));
    }
    for holder in [3, 6, 1] {
        assert_eq!(run(&mut bench, named(u64::from(holder))), holder, "the cache is followed");
    }
    changes(&mut bench, 3, 2, vec![KvEvent::Removed(keys(3)), KvEvent::Stored(keys(50))]);
    assert_eq!(run(&mut bench, named(50)), 3, "a change is heard");
    changes(&mut bench, 3, 3, vec![KvEvent::Cleared]);
    assert_eq!(bench.front.says_held(ReplicaId(3), keys(50)[0]), Some(false));
}

#[test]
fn a_missed_change_is_asked_for_once_and_a_snapshot_heals() {
    let mut bench = bench(2);
    bench.frame(0, ReplicaFrame::KvSnapshot { number: 1, keys: keys(1) });
    bench.asks.clear();
    changes(&mut bench, 0, 4, vec![KvEvent::Stored(keys(4))]);
    changes(&mut bench, 0, 5, vec![KvEvent::Stored(keys(5))]);
    assert_eq!(bench.asks, [(0, 2)]);
    assert_eq!(bench.front.says_held(ReplicaId(0), keys(4)[0]), Some(false));
    bench.frame(0, ReplicaFrame::KvSnapshot { number: 5, keys: keys(5) });
    assert_eq!(bench.front.says_held(ReplicaId(0), keys(5)[0]), Some(true));
    assert_eq!(bench.front.says_held(ReplicaId(0), keys(1)[0]), Some(false));
    changes(&mut bench, 0, 6, vec![KvEvent::Stored(keys(6))]);
    assert_eq!(bench.front.says_held(ReplicaId(0), keys(6)[0]), Some(true));
}

#[test]
fn a_second_prompt_of_a_conversation_follows_the_first_before_its_replica_has_said_a_word() {
    let mut bench = bench(8);
    for seed in 100..116 {
        run(&mut bench, named(seed));
    }
    let first = run(&mut bench, named(7));
    for _ in 0..5 {
        assert_eq!(run(&mut bench, named(7)), first);
    }
    bench.now = bench.now + Duration::from_millis(60_000);
    // What nobody has confirmed for so long counts no more; the next dispatch forgets it.
    run(&mut bench, named(8));
    assert_eq!(bench.front.says_held(ReplicaId(first), keys(7)[0]), Some(false));
}

#[test]
fn names_are_made_only_where_there_is_a_choice() {
    let bench_of_one = bench(1);
    assert_eq!(bench_of_one.front.block_tokens_for_names("tiny"), None);
    assert_eq!(bench(2).front.block_tokens_for_names("tiny"), Some(8));
    assert_eq!(bench(2).front.block_tokens_for_names("mini"), None);
}
