//! What was recorded because a prompt was sent somewhere, before the replica said that it has it. Such a holder lasts until
//! an event confirms it or its time is over, whichever is first; the oldest give way when there are too many. O(1) per
//! prefix. Knows nothing of what the table holds.

use super::holders::SlotId;
use llmscale_types::PrefixKey;
use llmscale_types::Time;
use rustc_hash::FxHashMap;
use std::collections::VecDeque;

/// Holders that nobody has confirmed.
#[derive(Debug)]
pub(super) struct Speculation {
    /// For look-ups only.
    pending: FxHashMap<(SlotId, PrefixKey), Time>,
    /// Oldest first; also those that were confirmed or renewed since.
    queue: VecDeque<(Time, SlotId, PrefixKey)>,
    max_pending: usize,
}

impl Speculation {
    /// Most memory per pending prefix: its place in the queue and in the map, both at most half empty.
    pub(super) const MAX_BYTES: usize =
        2 * size_of::<(Time, SlotId, PrefixKey)>() + (size_of::<((SlotId, PrefixKey), Time)>() + 1) * 16 / 7;

    pub(super) fn new(max_pending: u32) -> Self {
        Self { pending: FxHashMap::default(), queue: VecDeque::new(), max_pending: max_pending as usize }
    }

    /// A holder was recorded, or its time begins anew. The one that gives way for it must be forgotten.
    pub(super) fn add(&mut self, slot: SlotId, key: PrefixKey, until: Time) -> Option<(SlotId, PrefixKey)> {
        let crowded_out = if self.queue.len() >= self.max_pending { self.pop() } else { None };
        self.pending.insert((slot, key), until);
        self.queue.push_back((until, slot, key));
        crowded_out
    }

    /// Whether a holder is unconfirmed.
    pub(super) fn contains(&self, slot: SlotId, key: PrefixKey) -> bool {
        self.pending.contains_key(&(slot, key))
    }

    /// An event spoke of it.
    pub(super) fn settle(&mut self, slot: SlotId, key: PrefixKey) {
        self.pending.remove(&(slot, key));
    }

    /// Nothing is expected of this slot any more.
    pub(super) fn forget(&mut self, slot: SlotId) {
        self.pending.retain(|(held, _), _| *held != slot);
    }

    /// The next holder whose time is over.
    pub(super) fn expired(&mut self, now: Time) -> Option<(SlotId, PrefixKey)> {
        while self.queue.front().is_some_and(|&(until, ..)| until <= now) {
            if let Some(found) = self.pop() {
                return Some(found);
            }
        }
        None
    }

    /// The oldest, unless it was confirmed or renewed.
    fn pop(&mut self) -> Option<(SlotId, PrefixKey)> {
        let (until, slot, key) = self.queue.pop_front()?;
        if self.pending.get(&(slot, key)) != Some(&until) {
            return None;
        }
        self.pending.remove(&(slot, key));
        Some((slot, key))
    }

    /// Memory.
    pub(super) fn bytes(&self) -> usize {
        self.queue.capacity() * size_of::<(Time, SlotId, PrefixKey)>()
            + self.pending.capacity() * (size_of::<((SlotId, PrefixKey), Time)>() + 1) * 8 / 7
    }

    /// Asserts that whatever is pending will be looked at.
    pub(super) fn check(&self) {
        assert!(self.queue.len() <= self.max_pending.max(1), "{} are queued", self.queue.len());
        let live = self.queue.iter().filter(|&&(until, slot, key)| self.pending.get(&(slot, key)) == Some(&until));
        let mut named: Vec<(SlotId, PrefixKey)> = live.map(|&(_, slot, key)| (slot, key)).collect();
        named.sort_unstable();
        named.dedup();
        assert_eq!(named.len(), self.pending.len(), "each unconfirmed holder is in the queue");
    }
}
