//! The invariants of a replica, each compared with a count made from scratch. Linear in everything, so for tests, the
//! simulator and idle moments; the cheap half of them is asserted in every change anyway.

use crate::replica::Replica;
use crate::sequences::Phase;
use llmscale_types::{BlockId, HostBlockId, Slot};
use std::collections::BTreeMap;

impl Replica {
    /// Walks the whole state. O(everything), for tests, the simulator and idle moments.
    pub fn check(&self) {
        let slots: Vec<Slot> = self.sequences.occupied().collect();
        let mut references: BTreeMap<BlockId, u32> = BTreeMap::new();
        for block in slots.iter().flat_map(|slot| &self.sequences.cold[slot.index()].table) {
            *references.entry(*block).or_default() += 1;
        }
        let mut pins: BTreeMap<HostBlockId, u32> = BTreeMap::new();
        for host in self.disk.fetches.iter().flat_map(|fetch| &fetch.hosts) {
            *pins.entry(*host).or_default() += 1;
        }
        for (_, host) in slots.iter().flat_map(|slot| &self.sequences.cold[slot.index()].restores) {
            *pins.entry(*host).or_default() += 1;
        }
        self.blocks
            .check(|block| references.get(&block).copied().unwrap_or(0), |host| pins.get(&host).copied().unwrap_or(0));
        let in_phase = |phase| slots.iter().filter(|slot| self.sequences.hot[slot.index()].phase == phase).count();
        let decoding = self.groups.iter().map(|group| group.decoding as usize).sum();
        let prefilling: usize = self.groups.iter().map(|group| group.prefilling.len()).sum();
        assert_eq!(in_phase(Phase::Decode), decoding, "decoding count");
        assert_eq!(in_phase(Phase::Prefill), prefilling, "prefilling lists");
        assert_eq!(self.running.len(), prefilling + decoding, "running set");
        for (place, group) in self.groups.iter().enumerate() {
            assert_eq!(group.wheel.len(), group.decoding as usize, "the wheel of group {place} holds who decodes");
            let flights = self.flights.iter().filter(|flight| flight.group.index() == place).count();
            assert!(self.groups.is_one() || flights <= 1, "group {place} has {flights} steps in flight");
        }
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
