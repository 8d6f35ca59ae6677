//! The ready replicas of one pool, so that the least loaded and any at random are found without looking at all: a dense
//! list and a tournament tree of minima over it. The least loaded is O(1), a change O(log replicas), no memory is taken for
//! either but when the list doubles. Loads are as of the last change of each replica; what a policy pays is computed anew.
//! Knows nothing of what a load is made of.

use llmscale_types::ReplicaId;
use rustc_hash::FxHashMap;

/// A leaf: load, then when it last changed, so that of equals the one that has waited longest is next: by number, the lowest
/// of the idle ones would compute three times as much as the highest, and its cache keep as much less.
type Entry = (u64, u64, ReplicaId);
/// Loses to every replica.
const NOBODY: Entry = (u64::MAX, u64::MAX, ReplicaId(u32::MAX));

/// One pool's ready replicas.
#[derive(Debug)]
pub(crate) struct Ranking {
    /// Minima: node n's children are 2n and 2n + 1, leaves are the second half, replicas fill them from the left.
    tree: Vec<Entry>,
    leaves: usize,
    count: usize,
    changes: u64,
    /// For look-ups only.
    leaf_of: FxHashMap<ReplicaId, u32>,
}

impl Default for Ranking {
    fn default() -> Self {
        Self { tree: vec![NOBODY; 2], leaves: 1, count: 0, changes: 0, leaf_of: FxHashMap::default() }
    }
}

impl Ranking {
    /// How many there are.
    pub(crate) fn count(&self) -> usize {
        self.count
    }

    /// The one at a place below `count`.
    pub(crate) fn at(&self, place: usize) -> ReplicaId {
        self.tree[self.leaves + place].2
    }

    /// The least loaded.
    pub(crate) fn least(&self) -> Option<ReplicaId> {
        (self.count > 0).then_some(self.tree[1].2)
    }

    /// Adds a replica or moves it to where its load belongs.
    pub(crate) fn set(&mut self, replica: ReplicaId, load_ns: u64) {
        let known = self.leaf_of.get(&replica).map(|&leaf| leaf as usize);
        if known.is_some_and(|leaf| self.tree[self.leaves + leaf].0 == load_ns) {
            return;
        }
        self.changes += 1;
        if let Some(leaf) = known {
            return self.put(leaf, (load_ns, self.changes, replica));
        }
        if self.count == self.leaves {
            self.double();
        }
        self.leaf_of.insert(replica, self.count as u32);
        self.put(self.count, (load_ns, self.changes, replica));
        self.count += 1;
    }

    /// Removes a replica; the last one of the list takes its place.
    pub(crate) fn remove(&mut self, replica: ReplicaId) {
        let Some(leaf) = self.leaf_of.remove(&replica) else {
            return;
        };
        self.count -= 1;
        let last = self.tree[self.leaves + self.count];
        self.put(self.count, NOBODY);
        if last.2 != replica {
            self.leaf_of.insert(last.2, leaf);
            self.put(leaf as usize, last);
        }
    }

    fn put(&mut self, leaf: usize, entry: Entry) {
        let mut node = self.leaves + leaf;
        self.tree[node] = entry;
        while node > 1 {
            node /= 2;
            let least = self.tree[2 * node].min(self.tree[2 * node + 1]);
            if self.tree[node] == least {
                return;
            }
            self.tree[node] = least;
        }
    }

    fn double(&mut self) {
        let entries = self.tree.split_off(self.leaves);
        self.leaves *= 2;
        self.tree = vec![NOBODY; 2 * self.leaves];
        for (leaf, entry) in entries.into_iter().enumerate() {
            self.put(leaf, entry);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Ranking;
    use llmscale_types::ReplicaId;
    use proptest::prelude::*;
    use std::collections::{BTreeMap, BTreeSet};

    proptest! {
        #[test]
        fn the_least_loaded_is_named_the_longest_unchanged_of_equals_and_everybody_is_listed_once(
            changes in prop::collection::vec((0_u32..40, prop::option::weighted(0.7, 0_u64..10)), 0..200),
        ) {
            let mut ranking = Ranking::default();
            let mut book: BTreeMap<ReplicaId, (u64, usize)> = BTreeMap::new();
            for (number, (replica, load)) in changes.into_iter().enumerate() {
                let replica = ReplicaId(replica);
                if let Some(load) = load {
                    ranking.set(replica, load);
                    book.entry(replica)
                        .and_modify(|entry| *entry = if entry.0 == load { *entry } else { (load, number) })
                        .or_insert((load, number));
                } else {
                    ranking.remove(replica);
                    book.remove(&replica);
                }
                let least = book.iter().min_by_key(|&(_, &entry)| entry).map(|(&replica, _)| replica);
                prop_assert_eq!(ranking.least(), least);
                let listed: BTreeSet<ReplicaId> = (0..ranking.count()).map(|place| ranking.at(place)).collect();
                prop_assert_eq!(listed, book.keys().copied().collect());
                prop_assert_eq!(ranking.count(), book.len());
            }
        }
    }
}
