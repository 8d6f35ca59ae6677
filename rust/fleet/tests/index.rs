//! The routing index against a book that keeps everything.

use llmscale_fleet::{IndexOptions, KvEvent, Level, PrefixIndex, PrefixKey, Taken};
use llmscale_types::{Duration, ReplicaId, Time};
use proptest::prelude::*;
use std::collections::{BTreeMap, BTreeSet};

const REPLICAS: u32 = 6;
const PENDING: Duration = Duration(1_000);

fn options() -> IndexOptions {
    IndexOptions { max_bytes: 2 << 20, max_pending_keys: 4_096, max_pending: PENDING, ..IndexOptions::default() }
}

fn index() -> PrefixIndex {
    let mut index = PrefixIndex::new(options()).expect("the sizes fit together");
    for replica in 0..REPLICAS {
        index.join(ReplicaId(replica));
    }
    index
}

/// Keys of a chain: as uniform as hashes are, but that the first hundred begin alike and share a segment.
fn key(number: u64) -> PrefixKey {
    let mixed = (number + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let key = (mixed ^ (mixed >> 29)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    PrefixKey(if number < 100 { key >> 12 } else { key })
}

fn keys(numbers: impl IntoIterator<Item = u64>) -> Vec<PrefixKey> {
    numbers.into_iter().map(key).collect()
}

/// Who holds one prefix, whatever comes before it.
fn holders(index: &PrefixIndex, key: PrefixKey) -> BTreeSet<u32> {
    let levels = index.levels(&[key]);
    let found = levels.iter().next().map(|level| level.replicas().map(|replica| replica.0).collect());
    found.unwrap_or_default()
}

/// How many keys of the prompt a replica holds.
fn held(index: &PrefixIndex, prompt: &[PrefixKey], replica: u32) -> u32 {
    index.levels(prompt).held_by(ReplicaId(replica)).map_or(0, Level::keys)
}

fn stored(index: &mut PrefixIndex, replica: u32, number: u64, stored: Vec<PrefixKey>) {
    let taken = index.apply(Time(0), ReplicaId(replica), number, &[KvEvent::Stored(stored)]);
    assert_eq!(taken, Taken::Applied);
}

#[test]
fn each_level_of_a_prompt_is_found_with_its_holders_at_every_depth() {
    let prompt = keys(0..100);
    for deep in 1_usize..=100 {
        for shallow in [1, deep / 2, deep.saturating_sub(1)] {
            let mut index = index();
            stored(&mut index, 0, 0, prompt[..deep].to_vec());
            stored(&mut index, 1, 0, prompt[..shallow].to_vec());
            stored(&mut index, 2, 0, prompt[..shallow.min(3)].to_vec());
            let expected = [deep, shallow, shallow.min(3)].map(|depth| depth as u32);
            assert_eq!([0, 1, 2].map(|replica| held(&index, &prompt, replica)), expected);
            assert_eq!(held(&index, &prompt, 3), 0);
            let depths: Vec<u32> = index.levels(&prompt).iter().map(Level::keys).collect();
            let mut distinct: Vec<u32> = expected.into_iter().filter(|&depth| depth > 0).collect();
            distinct.dedup();
            assert_eq!(depths, distinct);
        }
    }
}

#[test]
fn a_prompt_that_nobody_holds_has_no_level() {
    let mut index = index();
    assert!(index.levels(&[]).iter().next().is_none());
    stored(&mut index, 0, 0, keys(0..10));
    assert!(index.levels(&keys(100..164)).iter().next().is_none());
    assert!(index.levels(&[]).iter().next().is_none());
}

#[test]
fn a_lost_batch_is_asked_for_once_and_again_after_a_while() {
    let mut index = index();
    let mut apply = |now, number| index.apply(Time(now), ReplicaId(0), number, &[KvEvent::Stored(keys([number]))]);
    assert_eq!(apply(0, 0), Taken::Applied);
    assert_eq!(apply(1, 2), Taken::Ask { from: 1 });
    assert_eq!(apply(2, 3), Taken::Waiting);
    assert_eq!(apply(1_000_000, 4), Taken::Waiting);
    assert_eq!(apply(1_000_001, 4), Taken::Ask { from: 1 });
    for number in 1..=4 {
        assert_eq!(apply(1_000_002, number), Taken::Applied);
    }
    assert_eq!(apply(1_000_003, 4), Taken::Old);
    assert_eq!(apply(1_000_004, 6), Taken::Ask { from: 5 });
    assert_eq!(index.counters().gaps, 3);
    let all: Vec<bool> = (0..7).map(|number| holders(&index, key(number)).contains(&0)).collect();
    assert_eq!(all, [true, true, true, true, true, false, false], "each batch was applied in its turn");
}

#[test]
fn a_snapshot_replaces_what_was_known_and_an_older_one_changes_nothing() {
    let mut index = index();
    stored(&mut index, 0, 0, keys(0..4));
    assert_eq!(index.apply_snapshot(ReplicaId(0), 9, &keys(2..6)), Taken::Applied);
    assert_eq!((0..6).map(|number| holders(&index, key(number)).len()).collect::<Vec<_>>(), [0, 0, 1, 1, 1, 1]);
    assert_eq!(index.apply_snapshot(ReplicaId(0), 9, &[]), Taken::Old);
    stored(&mut index, 0, 10, keys([0]));
    assert_eq!(holders(&index, key(5)).len(), 1);
    assert_eq!(index.apply_snapshot(ReplicaId(77), 0, &[]), Taken::Unknown);
    assert_eq!(index.apply(Time(0), ReplicaId(77), 0, &[]), Taken::Unknown);
}

#[test]
fn a_dispatched_prompt_counts_as_held_until_its_time_is_over_or_an_event_confirms_it() {
    let mut index = index();
    assert_eq!(index.dispatch(Time(0), ReplicaId(3), &keys(0..8)), 0);
    assert_eq!(held(&index, &keys(0..8), 3), 8);
    assert_eq!(index.dispatch(Time(0), ReplicaId(3), &keys(0..9)[..8]), 8);
    stored(&mut index, 3, 0, keys(0..5));
    index.expire(Time(PENDING.0 - 1));
    assert_eq!(held(&index, &keys(0..8), 3), 8);
    index.expire(Time(PENDING.0));
    assert_eq!(held(&index, &keys(0..8), 3), 5);
    index.check();
}

#[test]
fn a_prompt_that_is_sent_again_is_unconfirmed_for_as_long_again() {
    let mut index = index();
    index.dispatch(Time(0), ReplicaId(3), &keys(0..8));
    index.dispatch(Time(600), ReplicaId(3), &keys(0..4));
    index.expire(Time(PENDING.0));
    assert_eq!(held(&index, &keys(0..8), 3), 4);
    index.expire(Time(600 + PENDING.0));
    assert_eq!(held(&index, &keys(0..8), 3), 0);
    assert_eq!((index.keys(), index.pending_keys()), (0, 0));
}

#[test]
fn the_oldest_unconfirmed_prefixes_give_way_when_there_are_too_many() {
    let small = IndexOptions { max_pending_keys: 10, ..options() };
    let mut index = PrefixIndex::new(small).expect("the sizes fit together");
    index.join(ReplicaId(0));
    index.dispatch(Time(0), ReplicaId(0), &keys(0..10));
    assert_eq!((index.keys(), index.pending_keys()), (0, 10));
    index.dispatch(Time(1), ReplicaId(0), &keys(10..13));
    let left: Vec<u64> = (0..13).filter(|&number| !holders(&index, key(number)).is_empty()).collect();
    assert_eq!(left, (3..13).collect::<Vec<_>>());
    index.check();
}

#[test]
fn a_replica_that_left_is_named_no_more_at_once_and_its_memory_is_free_after_a_sweep() {
    let mut index = index();
    for replica in 0..3 {
        stored(&mut index, replica, 0, keys(0..2_000));
    }
    stored(&mut index, 1, 1, keys(5_000..7_000));
    let before = index.bytes();
    index.leave(ReplicaId(1));
    assert_eq!(holders(&index, key(3)), [0, 2].into());
    assert!(holders(&index, key(6_000)).is_empty());
    assert_eq!(index.keys(), 4_000);
    index.sweep(usize::MAX);
    assert_eq!(index.keys(), 2_000);
    assert!(index.bytes() < before);
    index.check();
    index.join(ReplicaId(1));
    assert!(holders(&index, key(6_000)).is_empty(), "a number that is given out again holds nothing");
}

#[test]
fn memory_stays_within_its_bound_and_what_is_used_outlives_what_is_not() {
    let options = IndexOptions { max_bytes: 2 << 20, max_pending_keys: 4_096, ..IndexOptions::default() };
    let mut index = PrefixIndex::new(options.clone()).expect("the sizes fit together");
    index.join(ReplicaId(0));
    index.join(ReplicaId(1));
    let used = keys(0..500);
    for round in 0..2_000 {
        stored(&mut index, 0, round, keys(1_000 + round * 200..1_200 + round * 200));
        index.dispatch(Time(round), ReplicaId(1), &used);
        stored(&mut index, 1, round, used.clone());
    }
    index.check();
    assert!(index.bytes() <= options.max_bytes, "{} bytes", index.bytes());
    assert!(index.counters().evicted_keys > 200_000);
    assert!(index.keys() > 100_000, "{} keys", index.keys());
    assert_eq!(held(&index, &used, 1), 500);
    assert_eq!(holders(&index, key(1_000)), BTreeSet::new());
}

#[test]
fn many_different_sets_of_holders_stay_within_the_bound_too() {
    let options = IndexOptions { max_bytes: 2 << 20, max_pending_keys: 4_096, ..IndexOptions::default() };
    let mut index = PrefixIndex::new(options.clone()).expect("the sizes fit together");
    (0..40).for_each(|replica| index.join(ReplicaId(replica)));
    for replica in 0..40_u64 {
        let random = (0..30_000).filter(|&number| key(number * 64 + replica).0.is_multiple_of(3));
        stored(&mut index, replica as u32, 0, keys(random));
    }
    index.check();
    assert!(index.bytes() <= options.max_bytes, "{} bytes", index.bytes());
    assert!(index.counters().untold_holders > 1_000);
}

#[test]
fn options_that_do_not_fit_together_are_refused_with_the_limit() {
    let error = PrefixIndex::new(IndexOptions { max_bytes: 1 << 20, ..options() }).expect_err("too small");
    assert!(error.to_string().starts_with("max_bytes is 1048576, the least is "), "{error}");
    assert!(PrefixIndex::new(IndexOptions { tokens_per_key: 0, ..options() }).is_err());
    assert!(PrefixIndex::new(IndexOptions { max_pending_keys: 0, ..options() }).is_err());
}

#[derive(Clone, Debug)]
enum Operation {
    Stored(u32, u64, u64),
    Removed(u32, u64, u64),
    Cleared(u32),
    Lost(u32, u64),
    Snapshot(u32, u64, u64),
    Rejoin(u32),
    Dispatch(u32, u64, u64),
    Wait(u64),
    Sweep(usize),
}

fn operation() -> impl Strategy<Value = Operation> {
    let range = || (0..REPLICAS, 0_u64..60, 1_u64..30);
    prop_oneof![
        6 => range().prop_map(|(replica, from, count)| Operation::Stored(replica, from, count)),
        4 => range().prop_map(|(replica, from, count)| Operation::Removed(replica, from, count)),
        1 => (0..REPLICAS).prop_map(Operation::Cleared),
        1 => (0..REPLICAS, 0_u64..60).prop_map(|(replica, at)| Operation::Lost(replica, at)),
        1 => range().prop_map(|(replica, from, count)| Operation::Snapshot(replica, from, count)),
        1 => (0..REPLICAS).prop_map(Operation::Rejoin),
        4 => range().prop_map(|(replica, from, count)| Operation::Dispatch(replica, from, count)),
        2 => (1_u64..700).prop_map(Operation::Wait),
        2 => (0_usize..20).prop_map(Operation::Sweep),
    ]
}

/// What each replica holds, with the time until which it is unconfirmed, and the number of its next batch.
#[derive(Default)]
struct Book {
    held: BTreeMap<(u32, u64), Option<u64>>,
    next: BTreeMap<u32, u64>,
    now: u64,
}

impl Book {
    fn number(&mut self, replica: u32) -> u64 {
        let next = self.next.entry(replica).or_default();
        *next += 1;
        *next - 1
    }

    fn forget(&mut self, replica: u32) {
        self.held.retain(|&(holder, _), _| holder != replica);
    }

    fn apply(&mut self, index: &mut PrefixIndex, operation: &Operation) {
        let now = Time(self.now);
        match *operation {
            Operation::Stored(replica, from, count) => {
                let event = KvEvent::Stored(keys(from..from + count));
                assert_eq!(index.apply(now, ReplicaId(replica), self.number(replica), &[event]), Taken::Applied);
                self.held.extend((from..from + count).map(|key| ((replica, key), None)));
            }
            Operation::Removed(replica, from, count) => {
                let event = KvEvent::Removed(keys(from..from + count));
                assert_eq!(index.apply(now, ReplicaId(replica), self.number(replica), &[event]), Taken::Applied);
                (from..from + count).for_each(|key| _ = self.held.remove(&(replica, key)));
            }
            Operation::Cleared(replica) => {
                let taken = index.apply(now, ReplicaId(replica), self.number(replica), &[KvEvent::Cleared]);
                assert_eq!(taken, Taken::Applied);
                self.forget(replica);
            }
            Operation::Lost(replica, at) => {
                let [lost, seen] = [self.number(replica), self.number(replica)];
                let batch = |key| [KvEvent::Stored(keys([key]))];
                let taken = index.apply(now, ReplicaId(replica), seen, &batch(at + 1));
                assert_eq!(taken, Taken::Ask { from: lost });
                assert_eq!(index.apply(now, ReplicaId(replica), seen, &batch(at + 1)), Taken::Waiting);
                assert_eq!(index.apply(now, ReplicaId(replica), lost, &batch(at)), Taken::Applied);
                assert_eq!(index.apply(now, ReplicaId(replica), seen, &batch(at + 1)), Taken::Applied);
                self.held.extend([((replica, at), None), ((replica, at + 1), None)]);
            }
            Operation::Snapshot(replica, from, count) => {
                let number = self.number(replica);
                let taken = index.apply_snapshot(ReplicaId(replica), number, &keys(from..from + count));
                assert_eq!(taken, Taken::Applied);
                self.forget(replica);
                self.held.extend((from..from + count).map(|key| ((replica, key), None)));
            }
            Operation::Rejoin(replica) => {
                index.join(ReplicaId(replica));
                self.forget(replica);
                self.next.remove(&replica);
            }
            Operation::Dispatch(replica, from, count) => {
                index.dispatch(now, ReplicaId(replica), &keys(from..from + count));
                let until = Some(self.now + PENDING.0);
                for key in from..from + count {
                    self.held.entry((replica, key)).and_modify(|held| *held = held.and(until)).or_insert(until);
                }
            }
            Operation::Wait(time) => {
                self.now += time;
                index.expire(Time(self.now));
                self.held.retain(|_, until| until.is_none_or(|until| until > self.now));
            }
            Operation::Sweep(segments) => index.sweep(segments),
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    /// Whatever happens within the bound of memory, the index names exactly those that hold a prefix.
    #[test]
    fn the_index_agrees_with_the_book(operations in prop::collection::vec(operation(), 1..80)) {
        let mut index = index();
        let mut book = Book::default();
        for operation in &operations {
            book.apply(&mut index, operation);
            for number in 0..91 {
                let expected: BTreeSet<u32> =
                    (0..REPLICAS).filter(|&replica| book.held.contains_key(&(replica, number))).collect();
                prop_assert_eq!(holders(&index, key(number)), expected, "key {}", number);
            }
        }
        index.check();
        index.sweep(usize::MAX);
        index.check();
        let told = book.held.iter().filter(|(_, until)| until.is_none()).map(|(&(_, number), _)| number);
        prop_assert_eq!(index.keys(), told.collect::<BTreeSet<u64>>().len());
        // What was told behind a hole is expected once more when it is sent.
        let pending = book.held.values().flatten().count();
        prop_assert!((pending..=book.held.len()).contains(&index.pending_keys()), "{}", index.pending_keys());
        index.expire(Time(book.now + PENDING.0));
        prop_assert_eq!(index.pending_keys(), 0);
        for number in 0..91 {
            let told = |&replica: &u32| book.held.get(&(replica, number)) == Some(&None);
            prop_assert_eq!(holders(&index, key(number)), (0..REPLICAS).filter(told).collect(), "key {}", number);
        }
        index.check();
    }
}

proptest! {
    /// Of what is unconfirmed, exactly the newest places are kept, whatever was confirmed or sent again between.
    #[test]
    fn what_gives_way_is_what_was_sent_first_and_never_again(
        sent in prop::collection::vec((0..REPLICAS, 0_u64..40, 1_u64..12), 1..60),
        max_pending_keys in 1_u32..60,
    ) {
        let mut index = PrefixIndex::new(IndexOptions { max_pending_keys, ..options() }).expect("the sizes fit together");
        (0..REPLICAS).for_each(|replica| index.join(ReplicaId(replica)));
        let mut ring: Vec<(u32, u64)> = Vec::new();
        for (number, &(replica, from, count)) in sent.iter().enumerate() {
            index.dispatch(Time(number as u64), ReplicaId(replica), &keys(from..from + count));
            ring.extend((from..from + count).map(|number| (replica, number)));
            let kept = ring.len().saturating_sub(max_pending_keys as usize);
            for number in 0..51 {
                let expected = ring[kept..].iter().filter(|(_, key)| *key == number).map(|&(replica, _)| replica);
                prop_assert_eq!(holders(&index, key(number)), expected.collect(), "key {}", number);
            }
            index.check();
        }
    }
}
