//! Who is told what the prefix cache holds. Each change that fronts hear of has a number; the last ones are kept, so that a
//! front that missed some can be told again, and one that missed more gets all that is held now. O(changes x fronts that
//! listen), nothing while nobody does. Memory is bounded by what is kept. Knows nothing of what fronts make of it.

use crate::event::{Actions, KvWord};
use crate::replica::Replica;
use llmscale_blocks::BlockStore;
use llmscale_types::{FrontId, KvEvent, Planted, PrefixKey};
use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

/// Prefixes named in changes that are kept: half a megabyte, some minutes of a busy replica.
const MAX_KEPT_KEYS: usize = 65_536;
/// Most prefixes that a front is told of at once, as many as a column of a frame may have: 33 million tokens. A replica that
/// holds more is known for these.
const MAX_SNAPSHOT_KEYS: usize = 1 << 18;

/// What a front waits for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Wish {
    /// Everything from this number on, or all that is held now.
    From(u64),
    /// The next change.
    Next,
}

/// See the file's header.
#[derive(Debug, Default)]
pub(crate) struct KvFeed {
    listeners: BTreeMap<FrontId, Wish>,
    /// Number of the last change.
    last: u64,
    /// The last changes in order, up to `last`.
    kept: VecDeque<Arc<[KvEvent]>>,
    kept_keys: usize,
}

impl KvFeed {
    /// A front wants to be told, from a number on.
    pub(crate) fn ask(&mut self, front: FrontId, from: u64, blocks: &mut BlockStore) {
        if self.listeners.is_empty() {
            // Nobody has counted what changed before this moment.
            self.last += 1;
            blocks.want_changes(true);
        }
        self.listeners.insert(front, Wish::From(from));
    }

    /// A front is gone.
    pub(crate) fn forget(&mut self, front: FrontId, blocks: &mut BlockStore) {
        if self.listeners.remove(&front).is_some() && self.listeners.is_empty() {
            blocks.want_changes(false);
            self.drop_kept();
        }
    }

    /// Tells everybody what is new.
    pub(crate) fn tell(&mut self, blocks: &mut BlockStore, out: &mut Actions) {
        if self.listeners.is_empty() {
            return;
        }
        let changes = blocks.take_changes();
        let new = !changes.is_empty();
        if new {
            self.keep(changes.into());
        }
        let first_kept = self.last + 1 - self.kept.len() as u64;
        for (&front, wish) in &mut self.listeners {
            let from = match std::mem::replace(wish, Wish::Next) {
                Wish::From(from) => from,
                Wish::Next if new => self.last,
                Wish::Next => continue,
            };
            if from < first_kept || from > self.last + 1 {
                let keys = blocks.named().take(MAX_SNAPSHOT_KEYS).collect();
                out.kv.push((front, KvWord::Snapshot { number: self.last, keys }));
                continue;
            }
            let from = if Planted::ReplayLeavesOneOut.is_here() && from < self.last { from + 1 } else { from };
            for number in from..=self.last {
                let events = Arc::clone(&self.kept[(number - first_kept) as usize]);
                out.kv.push((front, KvWord::Changes { number, events }));
            }
        }
    }

    fn keep(&mut self, changes: Arc<[KvEvent]>) {
        self.last += 1;
        self.kept_keys += keys_of(&changes).max(1);
        self.kept.push_back(changes);
        while self.kept_keys > MAX_KEPT_KEYS {
            let oldest = self.kept.pop_front().expect("what has keys is kept");
            self.kept_keys -= keys_of(&oldest).max(1);
        }
    }

    fn drop_kept(&mut self) {
        self.kept.clear();
        self.kept_keys = 0;
    }
}

impl Replica {
    /// Names a prefix every so many tokens instead of the usual number, before the first request.
    pub fn name_prefixes_every(&mut self, tokens: u32) {
        self.blocks.name_prefixes_every(tokens);
    }

    /// Number of the last change of the cache that fronts were told.
    pub fn kv_changes(&self) -> u64 {
        self.kv_feed.last
    }

    /// Names of all prefixes in the cache that have one. O(blocks).
    pub fn named_prefixes(&self) -> impl Iterator<Item = PrefixKey> {
        self.blocks.named()
    }

    /// Tells fronts what has changed in the prefix cache. Drivers call it as often as they want to send; a change takes
    /// a frame per front that listens.
    pub fn tell_caches(&mut self, out: &mut Actions) {
        self.kv_feed.tell(&mut self.blocks, out);
    }
}

fn keys_of(events: &[KvEvent]) -> usize {
    events
        .iter()
        .map(|event| match event {
            KvEvent::Stored(keys) | KvEvent::Removed(keys) => keys.len(),
            KvEvent::Cleared => 0,
        })
        .sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use llmscale_blocks::{ChainHasher, Found};
    use llmscale_types::{BlockId, Token};
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    const FRONTS: u32 = 3;

    #[derive(Clone, Debug)]
    enum Operation {
        Compute(u8),
        Clear,
        Ask { front: u32, anew: bool },
        Gone(u32),
        Tell { heard: [bool; FRONTS as usize] },
    }

    fn operation() -> impl Strategy<Value = Operation> {
        prop_oneof![
            6 => any::<u8>().prop_map(Operation::Compute),
            1 => Just(Operation::Clear),
            2 => (0..FRONTS, any::<bool>()).prop_map(|(front, anew)| Operation::Ask { front, anew }),
            1 => (0..FRONTS).prop_map(Operation::Gone),
            4 => any::<[bool; FRONTS as usize]>().prop_map(|heard| Operation::Tell { heard }),
        ]
    }

    /// A front that believes what it is told in order, and asks for what is missing.
    #[derive(Default)]
    struct Listener {
        next: u64,
        held: BTreeSet<PrefixKey>,
        asked: bool,
    }

    impl Listener {
        /// Returns the number to ask from, when something is missing.
        fn hear(&mut self, word: &KvWord) -> Option<u64> {
            match word {
                KvWord::Snapshot { number, keys } => {
                    self.next = number + 1;
                    self.held = keys.iter().copied().collect();
                }
                KvWord::Changes { number, .. } if *number > self.next => return Some(self.next),
                KvWord::Changes { number, .. } if *number < self.next => {}
                KvWord::Changes { number, events } => {
                    self.next = number + 1;
                    for event in events.iter() {
                        match event {
                            KvEvent::Stored(keys) => self.held.extend(keys),
                            KvEvent::Removed(keys) => keys.iter().for_each(|key| _ = self.held.remove(key)),
                            KvEvent::Cleared => self.held.clear(),
                        }
                    }
                }
            }
            None
        }
    }

    /// Computes one prompt of three named prefixes in a store of eight blocks, so that older ones make room.
    fn compute(store: &mut BlockStore, seed: u8) {
        let ids: Vec<Token> = (0..3 * PrefixKey::TOKENS).map(|at| at / 7 + u32::from(seed % 5)).collect();
        let hashes = store.hasher().clone().chain(&[1; 32], &ids, PrefixKey::TOKENS);
        let hit = store.find_prefix(&[1; 32], &hashes, &ids);
        store.take_prefix(&hit.blocks);
        let on_device = |found| match found {
            Found::Device(block) => block,
            Found::Host(host) => unreachable!("there is no host tier, and block {host} is in it"),
        };
        let (mut table, mut content): (Vec<BlockId>, _) =
            (hit.blocks.into_iter().map(on_device).collect(), hit.content);
        for (index, ids) in ids.chunks_exact(PrefixKey::TOKENS as usize).enumerate().skip(table.len()) {
            let block = store.allocate().expect("only one prompt holds blocks at a time");
            content = Some(store.register(index as u32, block, &[1; 32], content, &hashes[index], ids));
            table.push(block);
        }
        store.release(&table);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(300))]
        #[test]
        fn who_hears_everything_from_some_number_on_knows_what_is_held(
            operations in prop::collection::vec(operation(), 1..60),
        ) {
            let mut store = BlockStore::new(8, PrefixKey::TOKENS, ChainHasher::new([7; 32]));
            let mut feed = KvFeed::default();
            let mut listeners: Vec<Listener> = (0..FRONTS).map(|_| Listener::default()).collect();
            // Whoever has missed something hears of it with the next change.
            let last = [Operation::Clear, Operation::Tell { heard: [true; FRONTS as usize] }];
            for operation in operations.into_iter().chain(last) {
                match operation {
                    Operation::Compute(seed) => compute(&mut store, seed),
                    Operation::Clear => store.reset(),
                    Operation::Ask { front, anew } => {
                        let listener = &mut listeners[front as usize];
                        if anew { *listener = Listener::default() }
                        listener.asked = true;
                        feed.ask(FrontId(front), listener.next, &mut store);
                    }
                    Operation::Gone(front) => {
                        listeners[front as usize] = Listener::default();
                        feed.forget(FrontId(front), &mut store);
                    }
                    Operation::Tell { heard } => {
                        let mut out = Actions::default();
                        feed.tell(&mut store, &mut out);
                        for (front, word) in &out.kv {
                            prop_assert!(listeners[front.index()].asked, "front {front} has not asked");
                            if !heard[front.index()] { continue }
                            if let Some(from) = listeners[front.index()].hear(word) {
                                feed.ask(*front, from, &mut store);
                            }
                        }
                        // Another round answers those who had missed something.
                        let mut out = Actions::default();
                        feed.tell(&mut store, &mut out);
                        for (front, word) in &out.kv {
                            if heard[front.index()] {
                                prop_assert_eq!(listeners[front.index()].hear(word), None);
                            }
                        }
                        let held: BTreeSet<PrefixKey> = store.named().collect();
                        for (front, listener) in listeners.iter().enumerate() {
                            if listener.asked && listener.next == feed.last + 1 {
                                prop_assert_eq!(&listener.held, &held, "front {}", front);
                            }
                        }
                    }
                }
            }
            prop_assert!(feed.kept_keys <= MAX_KEPT_KEYS);
            let told = listeners.iter().filter(|listener| listener.asked).all(|listener| listener.next == feed.last + 1);
            prop_assert!(told, "whoever asked knows everything in the end");
        }
    }

    #[test]
    fn nothing_is_kept_while_nobody_listens() {
        let mut store = BlockStore::new(8, PrefixKey::TOKENS, ChainHasher::new([7; 32]));
        let mut feed = KvFeed::default();
        compute(&mut store, 1);
        let mut out = Actions::default();
        feed.tell(&mut store, &mut out);
        assert!(out.kv.is_empty() && store.take_changes().is_empty() && feed.kept.is_empty());
    }

    #[test]
    fn a_front_that_missed_more_than_is_kept_gets_all_that_is_held() {
        let mut store = BlockStore::new(8, PrefixKey::TOKENS, ChainHasher::new([7; 32]));
        let mut feed = KvFeed::default();
        feed.ask(FrontId(1), 0, &mut store);
        feed.tell(&mut store, &mut Actions::default());
        for seed in 0..=MAX_KEPT_KEYS {
            compute(&mut store, seed as u8);
            feed.tell(&mut store, &mut Actions::default());
        }
        assert!(feed.kept_keys <= MAX_KEPT_KEYS && feed.kept.len() < MAX_KEPT_KEYS);
        feed.ask(FrontId(1), 2, &mut store);
        let mut out = Actions::default();
        feed.tell(&mut store, &mut out);
        let [(front, KvWord::Snapshot { number, keys })] = &out.kv[..] else { panic!("{:?}", out.kv) };
        assert_eq!((*front, *number, keys.len()), (FrontId(1), feed.last, store.named().count()));
    }
}
