//! The invariants of a replica, each compared with a count made from scratch. Linear in everything, so for tests, the
//! simulator and idle moments; the cheap half of them is asserted in every change anyway.

use crate::replica::Replica;
use crate::sequences::Phase;
use llmscale_types::{BlockId, Slot};
use std::collections::BTreeMap;

impl Replica {
    /// Walks the whole state. O(everything), for tests, the simulator and idle moments.
    pub fn check(&self) {
        let slots: Vec<Slot> = self.sequences.occupied().collect();
        let mut references: BTreeMap<BlockId, u32> = BTreeMap::new();
        for block in slots.iter().flat_map(|slot| &self.sequences.cold[slot.index()].table) {
            *references.entry(*block).or_default() += 1;
        }
        self.blocks.check(|block| references.get(&block).copied().unwrap_or(0));
        let in_phase = |phase| slots.iter().filter(|slot| self.sequences.hot[slot.index()].phase == phase).count();
        assert_eq!(in_phase(Phase::Decode), self.decoding as usize, "decoding count");
        assert_eq!(self.wheel.len(), self.decoding as usize, "the wheel holds the decoding sequences");
        assert_eq!(in_phase(Phase::Prefill), self.prefilling.len(), "prefilling list");
        assert_eq!(self.running.len(), self.prefilling.len() + self.decoding as usize, "running set");
        assert_eq!(self.places.len(), slots.len() + self.queue.len(), "every attempt has one place");
        assert!(
            self.queue.len() <= self.limits.max_waiting_sequences as usize + self.sequences.hot.len(),
            "queue bound"
        );
        assert_eq!(slots.len(), self.sequences.running() as usize, "slots in use");
        if slots.is_empty() {
            assert_eq!(self.blocks.free(), self.blocks.total(), "blocks are held though nothing runs");
        }
    }
}
