//! Paged block pool. Owns the reference counts and the free list of one replica; allocate, share and release are O(1)
//! per block. A released block that holds a known prefix goes to the end of the free list and is reused last (least
//! recently used first); one without goes to the front. Knows nothing of requests, tokens or devices.

use llmscale_types::BlockId;

/// Links of the free list; the last entry of the columns is the ring's anchor, so that no link is ever absent.
#[derive(Debug)]
pub struct BlockPool {
    references: Vec<u32>,
    next: Vec<u32>,
    previous: Vec<u32>,
    free: u32,
}

impl BlockPool {
    /// A pool of `total` blocks, all free, handed out in ascending order.
    pub fn new(total: u32) -> Self {
        let mut pool = Self {
            references: vec![0; total as usize],
            next: vec![0; total as usize + 1],
            previous: vec![0; total as usize + 1],
            free: 0,
        };
        pool.reset();
        pool
    }

    /// Forgets every reference: the device's memory is gone. All blocks are free and in ascending order again.
    pub fn reset(&mut self) {
        let total = self.total();
        self.references.fill(0);
        for block in 0..=total {
            self.next[block as usize] = if block == total { 0 } else { block + 1 };
            self.previous[block as usize] = if block == 0 { total } else { block - 1 };
        }
        self.free = total;
    }

    /// Blocks in all.
    pub fn total(&self) -> u32 {
        self.references.len() as u32
    }

    /// Blocks that nobody references.
    pub fn free(&self) -> u32 {
        self.free
    }

    /// How many sequences reference the block.
    pub fn references(&self, block: BlockId) -> u32 {
        self.references[block.index()]
    }

    /// Takes the block that was free for longest, with one reference. The caller drops what the prefix index knows of it.
    pub fn allocate(&mut self) -> Option<BlockId> {
        if self.free == 0 {
            return None;
        }
        let block = self.next[self.anchor()];
        self.unlink(block);
        self.references[block as usize] = 1;
        Some(BlockId(block))
    }

    /// The blocks that nobody references, in the order in which they are handed out.
    pub fn oldest(&self) -> impl Iterator<Item = BlockId> {
        let anchor = self.anchor() as u32;
        let behind = move |&block: &u32| Some(self.next[block as usize]).filter(|&next| next != anchor);
        std::iter::successors(behind(&anchor), behind).map(BlockId)
    }

    /// The same from the one that is handed out last.
    pub fn youngest(&self) -> impl Iterator<Item = BlockId> {
        let anchor = self.anchor() as u32;
        let before = move |&block: &u32| Some(self.previous[block as usize]).filter(|&previous| previous != anchor);
        std::iter::successors(before(&anchor), before).map(BlockId)
    }

    /// Adds a reference; a free block comes back to life with its content.
    pub fn share(&mut self, block: BlockId) {
        if self.references[block.index()] == 0 {
            self.unlink(block.0);
        }
        self.references[block.index()] += 1;
    }

    /// Drops a reference. The last one frees the block; `keep` says that its content is worth keeping for longest.
    pub fn release(&mut self, block: BlockId, keep: bool) {
        let count = &mut self.references[block.index()];
        assert!(*count > 0, "block {block} is released more often than it was taken");
        *count -= 1;
        if *count == 0 {
            let anchor = self.anchor() as u32;
            if keep {
                let last = self.previous[anchor as usize];
                self.link(last, block.0, anchor);
            } else {
                let first = self.next[anchor as usize];
                self.link(anchor, block.0, first);
            }
            self.free += 1;
        }
    }

    /// Walks the whole pool: the ring holds exactly the blocks without references. O(blocks), for tests and idle checks.
    pub fn check(&self) {
        let anchor = self.anchor() as u32;
        let (mut seen, mut at) = (0, self.next[anchor as usize]);
        while at != anchor {
            assert_eq!(self.references[at as usize], 0, "block {at} is free and referenced");
            assert_eq!(self.previous[self.next[at as usize] as usize], at, "the ring is broken at block {at}");
            seen += 1;
            assert!(seen <= self.total(), "the ring does not close");
            at = self.next[at as usize];
        }
        assert_eq!(seen, self.free, "free count and ring differ");
        let unreferenced = self.references.iter().filter(|&&count| count == 0).count() as u32;
        assert_eq!(unreferenced, self.free, "a block is neither free nor referenced");
    }

    fn anchor(&self) -> usize {
        self.references.len()
    }

    fn link(&mut self, before: u32, block: u32, after: u32) {
        self.next[before as usize] = block;
        self.previous[block as usize] = before;
        self.next[block as usize] = after;
        self.previous[after as usize] = block;
    }

    fn unlink(&mut self, block: u32) {
        let (before, after) = (self.previous[block as usize], self.next[block as usize]);
        self.next[before as usize] = after;
        self.previous[after as usize] = before;
        self.free -= 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::VecDeque;

    #[test]
    fn a_kept_block_is_reused_after_every_other_free_block() {
        let mut pool = BlockPool::new(3);
        let kept = pool.allocate().unwrap();
        let plain = pool.allocate().unwrap();
        pool.release(kept, true);
        pool.release(plain, false);
        assert_eq!(pool.allocate(), Some(plain));
        assert_eq!(pool.allocate(), Some(BlockId(2)));
        assert_eq!(pool.allocate(), Some(kept));
        assert_eq!(pool.allocate(), None);
    }

    #[test]
    #[should_panic(expected = "released more often")]
    fn a_double_release_is_an_assertion() {
        let mut pool = BlockPool::new(1);
        let block = pool.allocate().unwrap();
        pool.release(block, false);
        pool.release(block, false);
    }

    #[derive(Clone, Debug)]
    enum Operation {
        Allocate,
        Share(usize),
        Release(usize, bool),
        Revive(usize),
        Reset,
    }

    fn operation() -> impl Strategy<Value = Operation> {
        prop_oneof![
            6 => Just(Operation::Allocate),
            4 => any::<usize>().prop_map(Operation::Share),
            8 => (any::<usize>(), any::<bool>()).prop_map(|(pick, keep)| Operation::Release(pick, keep)),
            3 => any::<usize>().prop_map(Operation::Revive),
            1 => Just(Operation::Reset),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(300))]
        /// The model: a deque of free ids and a count per block.
        #[test]
        fn the_pool_agrees_with_a_naive_model(total in 1_u32..24, operations in prop::collection::vec(operation(), 0..200)) {
            let mut pool = BlockPool::new(total);
            let mut free: VecDeque<u32> = (0..total).collect();
            let mut counts = vec![0_u32; total as usize];
            for operation in operations {
                let used: Vec<u32> = (0..total).filter(|&block| counts[block as usize] > 0).collect();
                match operation {
                    Operation::Allocate => {
                        let expected = free.pop_front();
                        if let Some(block) = expected { counts[block as usize] = 1; }
                        prop_assert_eq!(pool.allocate().map(|block| block.0), expected);
                    }
                    Operation::Share(pick) if !used.is_empty() => {
                        let block = used[pick % used.len()];
                        counts[block as usize] += 1;
                        pool.share(BlockId(block));
                    }
                    Operation::Release(pick, keep) if !used.is_empty() => {
                        let block = used[pick % used.len()];
                        counts[block as usize] -= 1;
                        if counts[block as usize] == 0 {
                            if keep { free.push_back(block) } else { free.push_front(block) }
                        }
                        pool.release(BlockId(block), keep);
                    }
                    Operation::Revive(pick) if !free.is_empty() => {
                        let block = free.remove(pick % free.len()).unwrap();
                        counts[block as usize] = 1;
                        pool.share(BlockId(block));
                    }
                    Operation::Reset => {
                        free = (0..total).collect();
                        counts.fill(0);
                        pool.reset();
                    }
                    _ => {}
                }
                pool.check();
                prop_assert_eq!(pool.free(), free.len() as u32);
                prop_assert!(pool.oldest().map(|block| block.0).eq(free.iter().copied()));
                prop_assert!(pool.youngest().map(|block| block.0).eq(free.iter().rev().copied()));
                for block in 0..total {
                    prop_assert_eq!(pool.references(BlockId(block)), counts[block as usize]);
                }
            }
        }
    }
}
