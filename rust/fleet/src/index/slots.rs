//! Which number stands for which replica. A replica that is cleared gets a new number and the old one is retired at once,
//! so forgetting ten thousand prefixes takes no longer than forgetting one; the old number is given out again after a
//! sweep has been through the whole table. O(1) per look-up. Knows nothing of prefixes.

use super::holders::SlotId;
use llmscale_types::ReplicaId;
use rustc_hash::FxHashMap;
use std::collections::VecDeque;

/// Numbers of replicas.
#[derive(Debug, Default)]
pub(super) struct Slots {
    owners: Vec<Option<ReplicaId>>,
    /// For look-ups only.
    by_replica: FxHashMap<ReplicaId, SlotId>,
    free: Vec<SlotId>,
    /// With the number of segments that had been swept when it was retired; oldest first.
    retired: VecDeque<(SlotId, u64)>,
}

impl Slots {
    /// Numbers that can be told apart.
    pub(super) const MAX: usize = 1 << 16;

    /// The replica that a number stands for; `None` once it is retired.
    pub(super) fn owner(&self, slot: SlotId) -> Option<ReplicaId> {
        self.owners[usize::from(slot)]
    }

    /// The number of a replica.
    pub(super) fn of(&self, replica: ReplicaId) -> Option<SlotId> {
        self.by_replica.get(&replica).copied()
    }

    /// A number for a replica that has none; `None` if all are given out or wait for a sweep.
    pub(super) fn give(&mut self, replica: ReplicaId) -> Option<SlotId> {
        let slot = match self.free.pop() {
            Some(slot) => slot,
            None if self.owners.len() < Self::MAX => {
                self.owners.push(None);
                (self.owners.len() - 1) as SlotId
            }
            None => return None,
        };
        self.owners[usize::from(slot)] = Some(replica);
        let last = self.by_replica.insert(replica, slot);
        assert_eq!(last, None, "replica {replica} has one number");
        Some(slot)
    }

    /// Takes a replica's number away.
    pub(super) fn retire(&mut self, replica: ReplicaId, swept: u64) -> Option<SlotId> {
        let slot = self.by_replica.remove(&replica)?;
        self.owners[usize::from(slot)] = None;
        self.retired.push_back((slot, swept));
        Some(slot)
    }

    /// Whether numbers wait for a sweep.
    pub(super) fn wait_for_sweep(&self) -> bool {
        !self.retired.is_empty()
    }

    /// Numbers that a whole round of `segments` has passed may be given out again.
    pub(super) fn swept(&mut self, swept: u64, segments: usize) {
        while let Some(&(slot, since)) = self.retired.front()
            && swept - since >= segments as u64
        {
            self.retired.pop_front();
            self.free.push(slot);
        }
    }

    /// Memory, which is bounded by `MAX`.
    pub(super) fn bytes(&self) -> usize {
        self.owners.capacity() * size_of::<Option<ReplicaId>>()
            + self.by_replica.capacity() * (size_of::<(ReplicaId, SlotId)>() + 1) * 8 / 7
            + self.free.capacity() * size_of::<SlotId>()
            + self.retired.capacity() * size_of::<(SlotId, u64)>()
    }

    /// Asserts that each number is given out, free or retired.
    pub(super) fn check(&self) {
        assert_eq!(self.owners.len(), self.by_replica.len() + self.free.len() + self.retired.len());
        for (&replica, &slot) in &self.by_replica {
            assert_eq!(self.owner(slot), Some(replica), "slot {slot}");
        }
    }
}
