//! The block wheel: which decoding sequences need their next block in which round. All decoding sequences advance by one
//! token per round, so a sequence crosses a block boundary every `block_tokens` rounds, always in the same bucket; a round
//! looks at one bucket and touches nobody else. Insert and remove are O(1).

use crate::sequences::Cold;
use llmscale_types::Slot;

/// See the file's header.
#[derive(Debug)]
pub(crate) struct BlockWheel {
    buckets: Vec<Vec<Slot>>,
}

impl BlockWheel {
    pub(crate) fn new(block_tokens: u32) -> Self {
        Self { buckets: (0..block_tokens).map(|_| Vec::new()).collect() }
    }

    /// The sequences whose row of this round is the first of a new block.
    pub(crate) fn due(&self, round: u64) -> &[Slot] {
        &self.buckets[(round % self.buckets.len() as u64) as usize]
    }

    /// Adds a sequence whose join round and join position are set in its row.
    pub(crate) fn insert(&mut self, slot: Slot, cold: &mut [Cold]) {
        let bucket = self.bucket_of(&cold[slot.index()]);
        cold[slot.index()].bucket_index = self.buckets[bucket].len() as u32;
        self.buckets[bucket].push(slot);
    }

    pub(crate) fn remove(&mut self, slot: Slot, cold: &mut [Cold]) {
        let row = &cold[slot.index()];
        let (bucket, index) = (self.bucket_of(row), row.bucket_index as usize);
        let removed = self.buckets[bucket].swap_remove(index);
        assert_eq!(removed, slot, "the wheel holds slot {removed} where {slot} was put");
        if let Some(&moved) = self.buckets[bucket].get(index) {
            cold[moved.index()].bucket_index = index as u32;
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.buckets.iter().map(Vec::len).sum()
    }

    /// Position minus round stays the same while a sequence decodes; it is due when its position is a multiple.
    fn bucket_of(&self, row: &Cold) -> usize {
        let size = self.buckets.len() as u64;
        ((row.joined_round + size - u64::from(row.joined_tokens) % size) % size) as usize
    }
}
