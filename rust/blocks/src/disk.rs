//! The disk tier of a block store: a third pool, of places in files that outlive processes, and what they hold. What a file
//! held before this process began is recalled from records, of which only those are believed that the keyed chain hash
//! vouches for. O(1) per block, O(n log n) to recall n records. Knows neither the other tiers nor who reads and writes.

use crate::chain::{BlockHash, ChainHasher, Namespace};
use crate::pool::BlockPool;
use crate::prefix::{Content, ContentId, PrefixIndex};
use llmscale_types::{BlockId, DiskBlockId, Token};
use rustc_hash::FxHashMap;

/// What is kept beside the files about one place in them.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DiskRecord {
    /// The content's name. Numbers of names only rise, over all lives of a tier.
    pub id: ContentId,
    /// What comes before it.
    pub parent: Option<ContentId>,
    /// Who may find it.
    pub namespace: Namespace,
    /// The chain's hash up to its end.
    pub hash: BlockHash,
    /// Its ids.
    pub ids: Box<[Token]>,
}

/// What has to be changed in the records of a disk tier.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum IndexChange {
    /// A place holds this from now on.
    Put(DiskBlockId, Box<DiskRecord>),
    /// A place holds nothing of use.
    Drop(DiskBlockId),
    /// The files are others, of this incarnation, and hold nothing.
    Restart(u64),
}

/// See the file's header.
#[derive(Debug)]
pub struct DiskTier {
    pool: BlockPool,
    pub(crate) prefix: PrefixIndex,
}

impl DiskTier {
    /// A tier of `total` empty places.
    pub fn new(total: u32, block_tokens: u32) -> Self {
        Self { pool: BlockPool::new(total), prefix: PrefixIndex::new(total, block_tokens) }
    }

    /// Places in all.
    pub fn total(&self) -> u32 {
        self.pool.total()
    }

    /// Takes the place whose content was not asked for for longest, pinned. `None` if every place is pinned.
    pub(crate) fn reserve(&mut self) -> Option<(DiskBlockId, Option<Content>)> {
        let block = self.pool.allocate()?;
        let lost = self.prefix.reachable(block).map(|(content, _)| content.clone());
        self.prefix.forget(block);
        Some((DiskBlockId(block.0), lost))
    }

    /// A place that is pinned holds this.
    pub(crate) fn hold(&mut self, disk: DiskBlockId, content: Content, ids: &[Token]) {
        self.prefix.insert(BlockId(disk.0), content, ids);
    }

    /// Its content stays until it is unpinned.
    pub(crate) fn pin(&mut self, disk: DiskBlockId) {
        self.pool.share(BlockId(disk.0));
    }

    /// It gives way last.
    pub(crate) fn touch(&mut self, disk: DiskBlockId) {
        self.pin(disk);
        self.unpin(disk);
    }

    /// Takes one pin back.
    pub(crate) fn unpin(&mut self, disk: DiskBlockId) {
        let block = BlockId(disk.0);
        self.pool.release(block, self.prefix.holds(block));
    }

    /// What a place holds, with its ids, if it can be found.
    pub(crate) fn held(&self, disk: DiskBlockId) -> Option<(&Content, &[Token])> {
        self.prefix.reachable(BlockId(disk.0))
    }

    /// It does not hold what it should, and nobody has pinned it. Returns what that was, if it could be found.
    pub(crate) fn forget(&mut self, disk: DiskBlockId) -> Option<Content> {
        let block = BlockId(disk.0);
        assert_eq!(self.pool.references(block), 0, "disk block {disk} is pinned while its content is lost");
        let lost = self.prefix.reachable(block).map(|(content, _)| content.clone());
        self.prefix.forget(block);
        self.pool.share(block);
        self.pool.release(block, false);
        lost
    }

    /// The files are others. Nothing may be pinned.
    pub(crate) fn clear(&mut self) {
        assert_eq!(self.pool.free(), self.total(), "a block is pinned while the tier's files are lost");
        self.pool.reset();
        self.prefix.clear();
    }

    /// Takes up what was there before this process. A record counts if its parent's does and its hash is the one that
    /// `hasher` makes of its ids behind that parent: then it cannot be anybody else's. Every prefix of `blocks_per_key`
    /// blocks has a name. Returns the largest number of a content, and the places of records that do not count.
    pub(crate) fn recall(
        &mut self,
        hasher: &ChainHasher,
        mut records: Vec<(DiskBlockId, DiskRecord)>,
        blocks_per_key: u32,
    ) -> (u64, Vec<DiskBlockId>) {
        let last = records.iter().map(|(_, record)| record.id.get()).max().unwrap_or(0);
        // A parent was named before its children.
        records.sort_by_key(|(_, record)| record.id);
        let mut taken: FxHashMap<ContentId, Link> = FxHashMap::default();
        let (mut order, mut dropped) = (Vec::new(), Vec::new());
        for (disk, record) in records {
            let before = record.parent.and_then(|parent| taken.get(&parent).copied());
            let orphan = record.parent.is_some() && before.is_none();
            let link = self.link(hasher, disk, &record, before);
            let Some(link) = link.filter(|_| !orphan && !taken.contains_key(&record.id)) else {
                dropped.push(disk);
                continue;
            };
            taken.insert(record.id, link);
            let named = link.blocks.is_multiple_of(blocks_per_key.max(1)) && blocks_per_key > 0;
            let DiskRecord { id, parent, namespace, hash, ids } = record;
            self.prefix.insert(BlockId(disk.0), Content { id, parent, namespace, hash, named }, &ids);
            order.push((id, disk));
        }
        self.put_in_order(order);
        (last, dropped)
    }

    /// The record's link of its chain, behind the one before it, if it is one.
    fn link(&self, hasher: &ChainHasher, disk: DiskBlockId, record: &DiskRecord, before: Option<Link>) -> Option<Link> {
        let fits = disk.0 < self.total()
            && record.ids.len() == self.prefix.block_tokens()
            && !self.prefix.holds(BlockId(disk.0))
            && before.is_none_or(|link| link.namespace == record.namespace);
        let expected = hasher.block(&record.namespace, before.as_ref().map(|link| &link.hash), &record.ids);
        let blocks = before.map_or(0, |link| link.blocks) + 1;
        (fits && expected == record.hash).then_some(Link { hash: record.hash, namespace: record.namespace, blocks })
    }

    /// The youngest end of a chain keeps all of it young, and children give way before their parents.
    fn put_in_order(&mut self, mut order: Vec<(ContentId, DiskBlockId)>) {
        let mut youngest: FxHashMap<ContentId, ContentId> = FxHashMap::default();
        for &(id, disk) in order.iter().rev() {
            let own = *youngest.entry(id).or_insert(id);
            if let Some(parent) = self.prefix.content(BlockId(disk.0)).and_then(|content| content.parent) {
                let of_parent = youngest.entry(parent).or_insert(own);
                *of_parent = own.max(*of_parent);
            }
        }
        order.sort_by_key(|(id, _)| (youngest[id], std::cmp::Reverse(*id)));
        for (_, disk) in order {
            self.touch(disk);
        }
    }

    /// Walks everything, given how often each place is pinned. O(blocks), for tests and idle checks.
    pub(crate) fn check(&self, expected_pins: impl Fn(DiskBlockId) -> u32) {
        self.pool.check();
        for disk in (0..self.total()).map(DiskBlockId) {
            let (held, expected) = (self.pool.references(BlockId(disk.0)), expected_pins(disk));
            assert_eq!(held, expected, "disk block {disk} has {held} pins, the transfers have {expected}");
        }
    }
}

/// One link of a recalled chain.
#[derive(Clone, Copy)]
struct Link {
    hash: BlockHash,
    namespace: Namespace,
    /// Blocks from the beginning to its end.
    blocks: u32,
}
