//! Prefix index of one tier. Remembers for each block which ids it holds after which parent, and finds the block of a
//! given chain hash in O(1). A hit must agree in namespace, parent content and ids, so a hash collision costs a miss and
//! never another request's content. One entry per block, hence bounded by the pool; the pool decides when an entry dies.

use crate::chain::{BlockHash, Namespace};
use llmscale_types::{BlockId, PrefixKey, Token};
use rustc_hash::FxHashMap;
use std::num::NonZeroU64;

/// Names one registered content for ever, so that a child can tell its parent from a later tenant of the same block.
pub type ContentId = NonZeroU64;

/// What one block holds besides its ids.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Content {
    /// Its name, on every tier.
    pub id: ContentId,
    /// What comes before it.
    pub parent: Option<ContentId>,
    /// Who may find it.
    pub namespace: Namespace,
    /// The chain's hash up to its end.
    pub hash: BlockHash,
    /// Whether the prefix that it ends is one that the fleet knows by name.
    pub named: bool,
}

impl Content {
    /// The name of the prefix that it ends, if it has one.
    pub fn name(&self) -> Option<PrefixKey> {
        self.named.then(|| PrefixKey::of_hash(&self.hash))
    }

    /// What a copy of it is known by.
    pub fn tag(&self) -> u64 {
        key(&self.hash)
    }
}

/// Contents of blocks, by chain hash. Looked up by hash, never iterated.
#[derive(Debug)]
pub struct PrefixIndex {
    block_tokens: usize,
    entries: Vec<Option<Content>>,
    ids: Vec<Token>,
    by_hash: FxHashMap<u64, BlockId>,
}

impl PrefixIndex {
    /// An empty index for a pool of `total` blocks.
    pub fn new(total: u32, block_tokens: u32) -> Self {
        Self {
            block_tokens: block_tokens as usize,
            entries: vec![None; total as usize],
            ids: vec![0; total as usize * block_tokens as usize],
            by_hash: FxHashMap::default(),
        }
    }

    /// Tokens per block.
    pub fn block_tokens(&self) -> usize {
        self.block_tokens
    }

    /// Whether it holds nothing. O(blocks).
    pub fn is_empty(&self) -> bool {
        self.entries.iter().all(Option::is_none)
    }

    /// The block that holds `ids` after `parent`, if any.
    pub fn find(
        &self,
        namespace: &Namespace,
        parent: Option<ContentId>,
        hash: &BlockHash,
        ids: &[Token],
    ) -> Option<(BlockId, ContentId)> {
        let block = *self.by_hash.get(&key(hash))?;
        let entry = self.entries[block.index()].as_ref()?;
        let same =
            entry.hash == *hash && entry.parent == parent && entry.namespace == *namespace && self.ids_of(block) == ids;
        same.then_some((block, entry.id))
    }

    /// The block that holds this content, if any.
    pub fn find_content(&self, content: &Content, ids: &[Token]) -> Option<BlockId> {
        let found = self.find(&content.namespace, content.parent, &content.hash, ids)?;
        (found.1 == content.id).then_some(found.0)
    }

    /// Whether a prefix of this hash can be found that has a name. Contents that were computed again after a lost parent have
    /// one name with the older ones.
    pub fn has_name(&self, hash: &BlockHash) -> bool {
        let block = self.by_hash.get(&key(hash));
        block.is_some_and(|block| self.entries[block.index()].as_ref().is_some_and(|entry| entry.named))
    }

    /// Records what a block holds. Of two blocks with one hash the newer is found; the older stays unreachable until it is
    /// reused.
    pub fn insert(&mut self, block: BlockId, content: Content, ids: &[Token]) {
        assert_eq!(ids.len(), self.block_tokens, "only full blocks are registered");
        assert!(self.entries[block.index()].is_none(), "block {block} is registered twice");
        let start = block.index() * self.block_tokens;
        self.ids[start..start + self.block_tokens].copy_from_slice(ids);
        self.by_hash.insert(key(&content.hash), block);
        self.entries[block.index()] = Some(content);
    }

    /// What the block holds, whether it can be found or not.
    pub fn content(&self, block: BlockId) -> Option<&Content> {
        self.entries[block.index()].as_ref()
    }

    /// What the block holds, with its ids, if it can be found.
    pub fn reachable(&self, block: BlockId) -> Option<(&Content, &[Token])> {
        let content = self.entries[block.index()].as_ref()?;
        (self.by_hash.get(&key(&content.hash)) == Some(&block)).then(|| (content, self.ids_of(block)))
    }

    /// Whether the block's content can still be found.
    pub fn holds(&self, block: BlockId) -> bool {
        self.entries[block.index()].is_some()
    }

    /// The block is about to hold something else.
    pub fn forget(&mut self, block: BlockId) {
        let Some(entry) = self.entries[block.index()].take() else { return };
        // What was computed again after a lost parent is there twice, and found in the newer block alone.
        if self.by_hash.get(&key(&entry.hash)) == Some(&block) {
            self.by_hash.remove(&key(&entry.hash));
        }
    }

    /// Everything that can be found, by block. O(blocks).
    pub fn all_reachable(&self) -> impl Iterator<Item = &Content> {
        self.reachable_blocks().map(|(_, content)| content)
    }

    /// The same with the blocks.
    pub fn reachable_blocks(&self) -> impl Iterator<Item = (BlockId, &Content)> {
        let blocks = (0..self.entries.len() as u32).map(BlockId);
        blocks.filter_map(|block| self.reachable(block).map(|(content, _)| (block, content)))
    }

    /// The memory is gone: nothing is known any more.
    pub fn clear(&mut self) {
        self.entries.fill(None);
        self.by_hash.clear();
    }

    fn ids_of(&self, block: BlockId) -> &[Token] {
        let start = block.index() * self.block_tokens;
        &self.ids[start..start + self.block_tokens]
    }
}

/// The map's key: a hash is uniform already, so its first half word will do; the entry holds the whole.
fn key(hash: &BlockHash) -> u64 {
    u64::from_le_bytes(hash[..8].try_into().expect("a hash has 32 bytes"))
}
