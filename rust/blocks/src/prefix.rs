//! Prefix index. Remembers for each block which ids it holds after which parent, and finds the block of a given chain
//! hash in O(1). A hit must agree in namespace, parent content and ids, so a hash collision costs a miss and never
//! another request's content. One entry per block, hence bounded by the pool; the pool decides when an entry dies.

use crate::chain::{BlockHash, Namespace};
use llmscale_types::{BlockId, PrefixKey, Token};
use rustc_hash::FxHashMap;
use std::num::NonZeroU64;

/// Names one registered content for ever, so that a child can tell its parent from a later tenant of the same block.
pub type ContentId = NonZeroU64;

#[derive(Clone, Debug)]
struct Entry {
    content: ContentId,
    parent: Option<ContentId>,
    namespace: Namespace,
    hash: BlockHash,
    /// Whether the prefix that it ends is one that the fleet knows by name.
    named: bool,
}

/// Contents of blocks, by chain hash. Looked up by hash, never iterated.
#[derive(Debug)]
pub struct PrefixIndex {
    block_tokens: usize,
    entries: Vec<Option<Entry>>,
    ids: Vec<Token>,
    by_hash: FxHashMap<u64, BlockId>,
    next_content: u64,
}

impl PrefixIndex {
    /// An empty index for a pool of `total` blocks.
    pub fn new(total: u32, block_tokens: u32) -> Self {
        Self {
            block_tokens: block_tokens as usize,
            entries: vec![None; total as usize],
            ids: vec![0; total as usize * block_tokens as usize],
            by_hash: FxHashMap::default(),
            next_content: 1,
        }
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
        same.then_some((block, entry.content))
    }

    /// Records that `block` holds `ids` after `parent`. A block of the same hash keeps its place: the older copy is the
    /// one that others already share. `named` says whether the fleet knows the prefix that ends here by name. Returns the
    /// content that later blocks name as their parent, and whether it is new.
    pub fn register(
        &mut self,
        block: BlockId,
        namespace: &Namespace,
        parent: Option<ContentId>,
        hash: &BlockHash,
        ids: &[Token],
        named: bool,
    ) -> (ContentId, bool) {
        assert_eq!(ids.len(), self.block_tokens, "only full blocks are registered");
        if let Some((_, content)) = self.find(namespace, parent, hash, ids) {
            return (content, false);
        }
        assert!(self.entries[block.index()].is_none(), "block {block} is registered twice");
        let content = ContentId::new(self.next_content).expect("starts at one");
        self.next_content += 1;
        let start = block.index() * self.block_tokens;
        self.ids[start..start + self.block_tokens].copy_from_slice(ids);
        self.entries[block.index()] = Some(Entry { content, parent, namespace: *namespace, hash: *hash, named });
        // After a collision the newer content takes the place; the older stays unreachable until its block is reused.
        self.by_hash.insert(key(hash), block);
        (content, true)
    }

    /// Whether the block's content can still be found.
    pub fn holds(&self, block: BlockId) -> bool {
        self.entries[block.index()].is_some()
    }

    /// The block is about to hold something else. Returns the name of the prefix that cannot be found any more, if it has
    /// one. What was computed again after a lost parent is there twice, and found in the newer block alone.
    pub fn forget(&mut self, block: BlockId) -> Option<PrefixKey> {
        let entry = self.entries[block.index()].take()?;
        if self.by_hash.get(&key(&entry.hash)) != Some(&block) {
            return None;
        }
        self.by_hash.remove(&key(&entry.hash));
        entry.named.then(|| PrefixKey::of_hash(&entry.hash))
    }

    /// Names of all prefixes that have one and can be found. O(blocks).
    pub fn named(&self) -> impl Iterator<Item = PrefixKey> {
        self.entries.iter().enumerate().filter_map(|(block, entry)| {
            let entry = entry.as_ref().filter(|entry| entry.named)?;
            (self.by_hash.get(&key(&entry.hash))?.index() == block).then(|| PrefixKey::of_hash(&entry.hash))
        })
    }

    /// The device's memory is gone: nothing is known any more. Content ids go on, so that none is named twice.
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
