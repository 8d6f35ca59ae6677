//! The block store: pool and prefix index as one thing. Hands out blocks, finds shared prefixes, takes blocks back.
//! Every operation is O(blocks named in it). Sequences own their tables; the store owns counts and contents.

use crate::chain::{BlockHash, ChainHasher, Namespace};
use crate::changes::Changes;
use crate::pool::BlockPool;
use crate::prefix::{ContentId, PrefixIndex};
use llmscale_types::{BlockId, KvEvent, PrefixKey, Token};

/// How often prefixes were looked for and found, in tokens.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct CacheCounters {
    /// Tokens whose blocks were looked up.
    pub queried_tokens: u64,
    /// Tokens whose blocks were found.
    pub hit_tokens: u64,
    /// Blocks whose content was dropped to hold something else.
    pub evicted_blocks: u64,
}

/// Pool and prefix index of one replica.
#[derive(Debug)]
pub struct BlockStore {
    pool: BlockPool,
    prefix: PrefixIndex,
    hasher: ChainHasher,
    block_tokens: u32,
    counters: CacheCounters,
    changes: Changes,
    /// Blocks from one named prefix to the next; 0 if none has a name.
    blocks_per_key: u32,
}

/// A prefix that was found, already shared with the asker.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct PrefixHit {
    /// Blocks in order, one reference each taken for the asker.
    pub blocks: Vec<BlockId>,
    /// Content of the last of them: the parent of what the asker computes next.
    pub content: Option<ContentId>,
}

impl BlockStore {
    /// A store of `total` free blocks.
    pub fn new(total: u32, block_tokens: u32, hasher: ChainHasher) -> Self {
        Self {
            pool: BlockPool::new(total),
            prefix: PrefixIndex::new(total, block_tokens),
            hasher,
            block_tokens,
            counters: CacheCounters::default(),
            changes: Changes::default(),
            blocks_per_key: PrefixKey::TOKENS / block_tokens,
        }
    }

    /// Blocks in all.
    pub fn total(&self) -> u32 {
        self.pool.total()
    }

    /// Blocks that can be allocated now, cached contents included.
    pub fn free(&self) -> u32 {
        self.pool.free()
    }

    /// Tokens per block.
    pub fn block_tokens(&self) -> u32 {
        self.block_tokens
    }

    /// How often prefixes were found.
    pub fn counters(&self) -> CacheCounters {
        self.counters
    }

    /// The hasher, for whoever prepares chains off the critical path.
    pub fn hasher(&self) -> &ChainHasher {
        &self.hasher
    }

    /// How many leading blocks of the chain are cached, and how many of these are free now. Takes nothing.
    pub fn probe(&self, namespace: &Namespace, hashes: &[BlockHash], ids: &[Token]) -> (u32, u32) {
        let (mut parent, mut found, mut found_free) = (None, 0, 0);
        for (hash, block_ids) in hashes.iter().zip(ids.chunks_exact(self.block_tokens as usize)) {
            let Some((block, content)) = self.prefix.find(namespace, parent, hash, block_ids) else { break };
            parent = Some(content);
            found += 1;
            found_free += u32::from(self.pool.references(block) == 0);
        }
        (found, found_free)
    }

    /// Finds and shares the longest cached prefix of the chain.
    pub fn share_prefix(&mut self, namespace: &Namespace, hashes: &[BlockHash], ids: &[Token]) -> PrefixHit {
        let mut hit = PrefixHit::default();
        for (hash, block_ids) in hashes.iter().zip(ids.chunks_exact(self.block_tokens as usize)) {
            let Some((block, content)) = self.prefix.find(namespace, hit.content, hash, block_ids) else { break };
            self.pool.share(block);
            hit.blocks.push(block);
            hit.content = Some(content);
        }
        self.counters.queried_tokens += hashes.len() as u64 * u64::from(self.block_tokens);
        self.counters.hit_tokens += hit.blocks.len() as u64 * u64::from(self.block_tokens);
        hit
    }

    /// Takes one block for new content.
    pub fn allocate(&mut self) -> Option<BlockId> {
        let block = self.pool.allocate()?;
        if self.prefix.holds(block) {
            if let Some(key) = self.prefix.forget(block) {
                self.changes.removed(key);
            }
            self.counters.evicted_blocks += 1;
        }
        Some(block)
    }

    /// Makes a full, computed block findable by others. `index` is its place in the sequence's table.
    pub fn register(
        &mut self,
        index: u32,
        block: BlockId,
        namespace: &Namespace,
        parent: Option<ContentId>,
        hash: &BlockHash,
        ids: &[Token],
    ) -> ContentId {
        assert!(self.pool.references(block) > 0, "block {block} is registered by nobody who holds it");
        // 0 divides nothing.
        let named = (index + 1).is_multiple_of(self.blocks_per_key);
        let (content, new) = self.prefix.register(block, namespace, parent, hash, ids, named);
        if named && new {
            self.changes.stored(PrefixKey::of_hash(hash));
        }
        content
    }

    /// Names a prefix every so many tokens instead of the usual number, before anything is cached.
    pub fn name_prefixes_every(&mut self, tokens: u32) {
        assert_eq!(self.prefix.named().count(), 0, "names are settled before the first");
        self.blocks_per_key = tokens / self.block_tokens;
    }

    /// Begins or ends to keep what changes among the named prefixes.
    pub fn want_changes(&mut self, wanted: bool) {
        self.changes.want(wanted);
    }

    /// What has changed among the named prefixes since the last call, if it was wanted.
    pub fn take_changes(&mut self) -> Vec<KvEvent> {
        self.changes.take()
    }

    /// All named prefixes that can be found. O(blocks).
    pub fn named(&self) -> impl Iterator<Item = PrefixKey> {
        self.prefix.named()
    }

    /// Gives a table back, last block first, so that a prefix's children are reused before their parents.
    pub fn release(&mut self, table: &[BlockId]) {
        for &block in table.iter().rev() {
            let keep = self.prefix.holds(block);
            self.pool.release(block, keep);
        }
    }

    /// The device's memory is gone: all blocks are free, nothing is cached. Tables held by anybody are void.
    pub fn reset(&mut self) {
        self.pool.reset();
        self.prefix.clear();
        self.changes.cleared();
    }

    /// Walks everything, given how often sequences reference each block. O(blocks), for tests and idle checks.
    pub fn check(&self, expected_references: impl Fn(BlockId) -> u32) {
        self.pool.check();
        for block in (0..self.total()).map(BlockId) {
            let (held, expected) = (self.pool.references(block), expected_references(block));
            assert_eq!(held, expected, "block {block} has {held} references, the tables have {expected}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const TOKENS: u32 = 4;

    fn store(total: u32, bits: u32) -> BlockStore {
        BlockStore::new(total, TOKENS, ChainHasher::truncated([7; 32], bits))
    }

    /// Computes a sequence from nothing or from a shared prefix, registers its full blocks, returns its table.
    fn fill(store: &mut BlockStore, namespace: &Namespace, ids: &[Token]) -> (Vec<BlockId>, usize) {
        let hashes = store.hasher().clone().chain(namespace, ids, TOKENS);
        let hit = store.share_prefix(namespace, &hashes, ids);
        let found = hit.blocks.len();
        let (mut table, mut parent) = (hit.blocks, hit.content);
        for (index, block_ids) in ids.chunks_exact(TOKENS as usize).enumerate().skip(found) {
            let block = store.allocate().expect("the test's pool is large enough");
            parent = Some(store.register(index as u32, block, namespace, parent, &hashes[index], block_ids));
            table.push(block);
        }
        (table, found)
    }

    #[test]
    fn a_prefix_is_shared_between_sequences_of_one_namespace() {
        let mut store = store(16, 256);
        let (first, _) = fill(&mut store, &[1; 32], &[1, 2, 3, 4, 5, 6, 7, 8]);
        let (second, found) = fill(&mut store, &[1; 32], &[1, 2, 3, 4, 9, 9, 9, 9]);
        assert_eq!((found, first[0] == second[0], first[1] == second[1]), (1, true, false));
    }

    #[test]
    fn a_namespace_never_sees_the_blocks_of_another() {
        let mut store = store(16, 256);
        fill(&mut store, &[1; 32], &[1, 2, 3, 4]);
        assert_eq!(fill(&mut store, &[2; 32], &[1, 2, 3, 4]).1, 0);
    }

    #[test]
    fn released_contents_are_found_until_their_block_is_reused() {
        let mut store = store(2, 256);
        let (table, _) = fill(&mut store, &[1; 32], &[1, 2, 3, 4, 5, 6, 7, 8]);
        store.release(&table);
        let hashes = store.hasher().clone().chain(&[1; 32], &[1, 2, 3, 4, 5, 6, 7, 8], TOKENS);
        assert_eq!(store.probe(&[1; 32], &hashes, &[1, 2, 3, 4, 5, 6, 7, 8]), (2, 2));
        store.allocate().unwrap();
        // The child went first: its parent is still of use alone, the other way round it would not be.
        assert_eq!(store.probe(&[1; 32], &hashes, &[1, 2, 3, 4, 5, 6, 7, 8]), (1, 1));
        assert_eq!(store.counters().evicted_blocks, 1);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(200))]
        /// With two bits of hash nearly every lookup collides; a hit must still hold exactly the asker's ids and namespace.
        #[test]
        fn forced_hash_collisions_cost_misses_and_never_content(
            bits in 1_u32..9,
            sequences in prop::collection::vec((0_u8..3, prop::collection::vec(0_u32..3, 0..17), any::<bool>()), 1..40),
        ) {
            let mut store = store(512, bits);
            // What each block truly holds: namespace and every id from the start.
            let mut truth: Vec<Option<(u8, Vec<Token>)>> = vec![None; 512];
            let mut live: Vec<Vec<BlockId>> = Vec::new();
            for (space, ids, release) in sequences {
                let (table, found) = fill(&mut store, &[space; 32], &ids);
                for (index, block) in table.iter().enumerate() {
                    let prefix = ids[..(index + 1) * TOKENS as usize].to_vec();
                    if index < found {
                        prop_assert_eq!(truth[block.index()].as_ref(), Some(&(space, prefix)));
                    } else {
                        truth[block.index()] = Some((space, prefix));
                    }
                }
                if release { store.release(&table) } else { live.push(table) }
                store.check(|block| live.iter().flatten().filter(|&&held| held == block).count() as u32);
            }
        }
    }
}
