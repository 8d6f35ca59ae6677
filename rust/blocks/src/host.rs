//! The host tier of a block store: a second pool, of memory beside the device, and what its blocks hold. The least
//! recently used content gives way; what a coming copy reads is pinned by a reference, and what is being written to the
//! disk keeps its place among the others, but does not give way. O(1) per block, O(writes under way) to make room. Knows
//! neither the device's pool nor who copies.

use crate::pool::BlockPool;
use crate::prefix::{Content, PrefixIndex};
use llmscale_types::{BlockId, HostBlockId, Token};
use rustc_hash::FxHashSet;

/// See the file's header.
#[derive(Debug)]
pub struct HostTier {
    pool: BlockPool,
    pub(crate) prefix: PrefixIndex,
    writing: FxHashSet<HostBlockId>,
}

/// A content that gave way, if it could be found.
pub(crate) type Lost = Option<Content>;

impl HostTier {
    /// A tier of `total` empty blocks.
    pub fn new(total: u32, block_tokens: u32) -> Self {
        Self {
            pool: BlockPool::new(total),
            prefix: PrefixIndex::new(total, block_tokens),
            writing: FxHashSet::default(),
        }
    }

    /// Blocks in all.
    pub fn total(&self) -> u32 {
        self.pool.total()
    }

    /// Makes room for a content, which it holds from now on. `None` if no block can give way.
    pub(crate) fn take_in(&mut self, content: Content, ids: &[Token]) -> Option<(HostBlockId, Lost)> {
        let (host, lost) = self.reserve()?;
        self.hold(host, content, ids);
        self.unpin(host);
        Some((host, lost))
    }

    /// Takes the place whose content gives way next, pinned and empty. `None` if every block is pinned or being written.
    pub(crate) fn reserve(&mut self) -> Option<(HostBlockId, Lost)> {
        let block = self.pool.oldest().find(|block| !self.writing.contains(&HostBlockId(block.0)))?;
        self.pool.share(block);
        let lost = self.prefix.reachable(block).map(|(content, _)| content.clone());
        self.prefix.forget(block);
        Some((HostBlockId(block.0), lost))
    }

    /// A place that is pinned holds this.
    pub(crate) fn hold(&mut self, host: HostBlockId, content: Content, ids: &[Token]) {
        self.prefix.insert(BlockId(host.0), content, ids);
    }

    /// What a block holds, with its ids, if it can be found.
    pub(crate) fn held(&self, host: HostBlockId) -> Option<(&Content, &[Token])> {
        self.prefix.reachable(BlockId(host.0))
    }

    /// Its content is being written to the disk: it does not give way before `end_write`.
    pub(crate) fn begin_write(&mut self, host: HostBlockId) {
        let new = self.writing.insert(host);
        assert!(new, "host block {host} is written twice at once");
    }

    /// It is written, or was not. With `gives_way` it is the next to give way, if nobody has pinned it.
    pub(crate) fn end_write(&mut self, host: HostBlockId, gives_way: bool) {
        let known = self.writing.remove(&host);
        assert!(known, "host block {host} is not being written");
        let block = BlockId(host.0);
        if gives_way && self.pool.references(block) == 0 {
            self.pool.share(block);
            self.pool.release(block, false);
        }
    }

    /// Whether its content is being written to the disk.
    pub(crate) fn is_writing(&self, host: HostBlockId) -> bool {
        self.writing.contains(&host)
    }

    /// Blocks in the order in which they give way, those that are pinned left out.
    pub(crate) fn oldest(&self) -> impl Iterator<Item = HostBlockId> {
        self.pool.oldest().map(|block| HostBlockId(block.0))
    }

    /// The same from the one that gives way last.
    pub(crate) fn youngest(&self) -> impl Iterator<Item = HostBlockId> {
        self.pool.youngest().map(|block| HostBlockId(block.0))
    }

    /// Blocks that cannot give way, at most.
    pub(crate) fn pinned(&self) -> u32 {
        self.pool.total() - self.pool.free() + self.writing.len() as u32
    }

    /// It was asked for: it gives way last.
    pub(crate) fn touch(&mut self, host: HostBlockId) {
        self.pin(host);
        self.unpin(host);
    }

    /// Its content stays until it is unpinned.
    pub(crate) fn pin(&mut self, host: HostBlockId) {
        self.pool.share(BlockId(host.0));
    }

    /// Takes one pin back.
    pub(crate) fn unpin(&mut self, host: HostBlockId) {
        let block = BlockId(host.0);
        self.pool.release(block, self.prefix.holds(block));
    }

    /// The tag of a pinned block's content, which may be shadowed by another of the same hash by now.
    pub(crate) fn tag(&self, host: HostBlockId) -> u64 {
        self.prefix.content(BlockId(host.0)).expect("a pinned block keeps its content").tag()
    }

    /// It does not hold what it should. Returns what that was, if it could be found.
    pub(crate) fn forget(&mut self, host: HostBlockId) -> Lost {
        if host.0 >= self.total() {
            return None;
        }
        let block = BlockId(host.0);
        let lost = self.prefix.reachable(block).map(|(content, _)| content.clone());
        assert_eq!(self.pool.references(block), 0, "host block {host} is pinned while its content is lost");
        assert!(!self.is_writing(host), "host block {host} is being written while its content is lost");
        self.prefix.forget(block);
        // Reused before anything that is worth keeping.
        self.pool.share(block);
        self.pool.release(block, false);
        lost
    }

    /// Its memory is gone. Nothing may be pinned.
    pub(crate) fn clear(&mut self) {
        assert_eq!(
            (self.pool.free(), self.writing.len()),
            (self.total(), 0),
            "a block is in use while its memory is lost"
        );
        self.pool.reset();
        self.prefix.clear();
    }

    /// Walks everything, given how often each block is pinned and which are being written. O(blocks), for tests and idle
    /// checks.
    pub(crate) fn check(&self, expected_pins: impl Fn(HostBlockId) -> u32, writing: &FxHashSet<HostBlockId>) {
        self.pool.check();
        assert_eq!(self.writing, *writing, "blocks that are being written");
        for host in (0..self.total()).map(HostBlockId) {
            let (held, expected) = (self.pool.references(BlockId(host.0)), expected_pins(host));
            assert_eq!(held, expected, "host block {host} has {held} pins, the tables have {expected}");
        }
    }
}
