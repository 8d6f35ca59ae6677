//! Who gets a request when it is known who holds its prefix.

mod common;

use common::{fleet, need, offer, set};
use llmscale_fleet::{
    Fleet, IndexOptions, KvEvent, Load, Need, Offer, Policy, PoolId, PredictedSeconds, PrefixIndex, PrefixKey,
    ReplicaState,
};
use llmscale_types::{Duration, ReplicaId, RequestId, Time};
use proptest::prelude::*;
use std::collections::BTreeSet;
use std::sync::Arc;

fn indexed(replicas: u32) -> (Fleet, PoolId) {
    let options = IndexOptions { max_bytes: 16 << 20, ..IndexOptions::default() };
    let index = PrefixIndex::new(options).expect("the sizes fit together");
    common::filled(Fleet::with_prefixes(1_024, index), replicas)
}

fn key(number: u64) -> PrefixKey {
    PrefixKey((number + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15))
}

fn prefix(numbers: std::ops::Range<u64>) -> Arc<[PrefixKey]> {
    numbers.map(key).collect()
}

/// A request whose context is as long as its prefix and half a key more.
fn asks(pool: PoolId, request: u64, prefix: &Arc<[PrefixKey]>) -> Need {
    let context_tokens = prefix.len() as u64 * 128 + 64;
    Need { request: RequestId(request), context_tokens, prefix: Arc::clone(prefix), ..need(pool) }
}

fn holds(fleet: &mut Fleet, replica: u32, number: u64, keys: &[PrefixKey]) {
    let index = fleet.prefixes_mut().expect("it has an index");
    index.apply(Time(0), ReplicaId(replica), number, &[KvEvent::Stored(keys.to_vec())]);
}

fn choose(fleet: &Fleet, need: &Need) -> Option<u32> {
    PredictedSeconds.choose(fleet, need).map(|id| id.0)
}

fn waiting(tokens: u64) -> Load {
    Load { sequences: 1, unstarted_sequences: 1, unstarted_tokens: tokens, output_tokens: 10 }
}

#[test]
fn a_conversation_stays_where_its_prefix_is() {
    let (mut fleet, pool) = indexed(100);
    let prompt = prefix(0..20);
    holds(&mut fleet, 42, 0, &prompt[..18]);
    holds(&mut fleet, 43, 0, &prompt[..2]);
    assert!((0..200).all(|request| choose(&fleet, &asks(pool, request, &prompt)) == Some(42)));
}

#[test]
fn a_queue_that_is_longer_than_its_cache_is_worth_is_left_for_an_empty_one() {
    let (mut fleet, pool) = indexed(100);
    let prompt = prefix(0..2);
    holds(&mut fleet, 42, 0, &prompt);
    let ask = asks(pool, 1, &prompt);
    // 256 tokens of 50 us are saved, and count thirteen times: 166 ms, which is the time of 3,328 tokens.
    set(&mut fleet, 42, |member| member.load = waiting(3_000));
    assert_eq!(choose(&fleet, &ask), Some(42));
    set(&mut fleet, 42, |member| member.load = waiting(3_700));
    assert_ne!(choose(&fleet, &ask), Some(42));
}

#[test]
fn a_system_prompt_that_all_share_sends_nobody_anywhere() {
    let (mut fleet, pool) = indexed(100);
    let prompt = prefix(0..10);
    (0..60).for_each(|replica| holds(&mut fleet, replica, 0, &prompt));
    // Those that hold it have as much to do as those that do not, but for one.
    (0..99).for_each(|replica| set(&mut fleet, replica, |member| member.load = waiting(4_000)));
    let chosen: BTreeSet<_> = (0..100).map(|request| choose(&fleet, &asks(pool, request, &prompt))).collect();
    assert_eq!(chosen, [Some(99)].into(), "the idle one, though it holds nothing");
}

#[test]
fn of_two_holders_the_less_loaded_is_chosen() {
    let (mut fleet, pool) = indexed(100);
    let prompt = prefix(0..10);
    holds(&mut fleet, 42, 0, &prompt);
    holds(&mut fleet, 43, 0, &prompt);
    set(&mut fleet, 42, |member| member.load = waiting(500));
    assert!((0..100).all(|request| choose(&fleet, &asks(pool, request, &prompt)) == Some(43)));
}

#[test]
fn a_holder_that_may_not_take_it_is_passed_over() {
    let (mut fleet, pool) = indexed(100);
    let prompt = prefix(0..10);
    holds(&mut fleet, 42, 0, &prompt);
    let ask = asks(pool, 1, &prompt);
    assert_eq!(choose(&fleet, &ask), Some(42));
    set(&mut fleet, 42, |member| member.state = Some(ReplicaState::Draining));
    assert!(choose(&fleet, &ask).is_some_and(|id| id != 42));
    set(&mut fleet, 42, |member| {
        member.state = Some(ReplicaState::Ready);
        member.load = Load { sequences: 12, output_tokens: 80_000, ..Load::default() };
    });
    assert!(choose(&fleet, &ask).is_some_and(|id| id != 42));
    set(&mut fleet, 42, |member| member.load = Load::default());
    fleet.leave(ReplicaId(42));
    assert!(choose(&fleet, &ask).is_some_and(|id| id != 42));
    fleet.join(ReplicaId(42), offer("a")).expect("its place is kept");
    assert!(choose(&fleet, &ask).is_some_and(|id| id != 42), "its next incarnation holds nothing");
}

#[test]
fn the_only_replica_that_fits_is_found_among_a_thousand() {
    let (mut fleet, pool) = indexed(1_000);
    for replica in (0..1_000).filter(|&replica| replica != 617) {
        set(&mut fleet, replica, |member| member.limits.max_sequence_tokens = 99);
    }
    set(&mut fleet, 617, |member| member.load = waiting(4_000));
    assert!((0..20).all(|request| choose(&fleet, &asks(pool, request, &prefix(0..3))) == Some(617)));
    set(&mut fleet, 617, |member| member.limits.max_sequence_tokens = 99);
    assert_eq!(choose(&fleet, &asks(pool, 1, &prefix(0..3))), None);
}

#[test]
fn a_stream_goes_on_where_it_is_computed_alike_though_its_prefix_is_elsewhere() {
    let (mut fleet, pool) = indexed(50);
    fleet.join(ReplicaId(77), Offer { numerics: "other".into(), ..offer("a") }).expect("there is room");
    let prompt = prefix(0..10);
    holds(&mut fleet, 42, 0, &prompt);
    let begun = |numerics: &str| Need { numerics: Some(numerics.into()), ..asks(pool, 1, &prompt) };
    assert_eq!(choose(&fleet, &begun("test")), Some(42));
    assert_eq!(choose(&fleet, &begun("other")), Some(77));
}

#[test]
fn without_an_index_the_least_loaded_is_chosen() {
    let (mut fleet, pool) = fleet(100);
    (0..100).for_each(|replica| set(&mut fleet, replica, |member| member.load = waiting(1_000)));
    set(&mut fleet, 31, |member| member.load = waiting(10));
    assert!((0..100).all(|request| choose(&fleet, &asks(pool, request, &prefix(0..10))) == Some(31)));
}

#[test]
fn equal_replicas_are_drawn_evenly_and_the_same_request_draws_the_same() {
    let (fleet, pool) = indexed(20);
    let at = |request| Need { now: Time(request * 7), ..asks(pool, request, &prefix(0..3)) };
    let mut counts = [0; 20];
    (0..2_000).for_each(|request| counts[choose(&fleet, &at(request)).expect("all are idle") as usize] += 1);
    assert!(counts.iter().all(|&count| (60..140).contains(&count)), "{counts:?}");
    assert_eq!(choose(&fleet, &at(9)), choose(&fleet, &at(9)));
}

proptest! {
    /// Whatever is held and loaded: somebody is chosen exactly if somebody fits, and the chosen one fits.
    #[test]
    fn nobody_waits_while_a_replica_fits(
        loads in prop::collection::vec((0_u32..14, 0_u64..1 << 14, 0_u64..1 << 40, 0_u64..3_000, 0_u64..12), 1..30),
        total_tokens in 0_u64..2_000,
        request in any::<u64>(),
    ) {
        let (mut fleet, pool) = indexed(loads.len() as u32);
        let prompt = prefix(0..12);
        for (id, (sequences, unstarted_tokens, output_tokens, until, held)) in loads.into_iter().enumerate() {
            holds(&mut fleet, id as u32, 0, &prompt[..held as usize]);
            set(&mut fleet, id as u32, |member| {
                member.load = Load { sequences, unstarted_sequences: sequences, unstarted_tokens, output_tokens };
                member.refused_until = Some(Time(until));
                member.limits.max_sequence_tokens = 500 + (until % 1_000) as u32;
            });
        }
        let look_ahead = Duration::from_millis(400);
        let need = Need { total_tokens, look_ahead, ..asks(pool, request, &prompt) };
        let fits = |id: u32| fleet.get(ReplicaId(id)).is_some_and(|member| need.fits(member));
        let chosen = choose(&fleet, &need);
        prop_assert_eq!(chosen.is_some(), fleet.members().any(|member| need.fits(member)));
        prop_assert!(chosen.is_none_or(fits));
    }
}
