//! The block store: the tiers' pools and prefix indexes as one thing. Hands out blocks, finds shared prefixes, takes
//! blocks back, and says what has to be copied when a content goes from the device to the host or back; what goes between
//! the host and the disk is `transfers`. Every operation is O(blocks named in it). Sequences own their tables; the store
//! owns counts and contents.

mod saves;
mod transfers;

use crate::chain::{BlockHash, ChainHasher, Namespace};
use crate::changes::Changes;
use crate::disk::DiskTier;
use crate::host::{HostTier, Lost};
use crate::pool::BlockPool;
use crate::prefix::{Content, ContentId, PrefixIndex};
use llmscale_types::{BlockCopy, BlockId, CopyDirection, Delta, HostBlockId, KvEvent, Planted, PrefixKey, Token};

/// How often prefixes were looked for and found, in tokens.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct CacheCounters {
    /// Tokens whose blocks were looked up.
    pub queried_tokens: u64,
    /// Tokens whose blocks were found.
    pub hit_tokens: u64,
    /// Blocks whose content was dropped to hold something else, copied to the host or not.
    pub evicted_blocks: u64,
    /// Blocks that were copied to the host when they were evicted.
    pub offloaded_blocks: u64,
    /// Blocks that were copied back from the host.
    pub restored_blocks: u64,
    /// Host blocks that did not hold what they should.
    pub bad_host_blocks: u64,
    /// Blocks that were written from the host to the disk.
    pub disk_written_blocks: u64,
    /// Blocks that were read from the disk to the host.
    pub disk_read_blocks: u64,
    /// Disk blocks that did not hold what they should, or could not be read.
    pub bad_disk_blocks: u64,
    /// Writes to the disk that failed.
    pub failed_disk_writes: u64,
    /// How often copies of a step waited for a transfer.
    pub disk_waits: u64,
}

/// Pool and prefix index of one replica.
#[derive(Debug)]
pub struct BlockStore {
    pool: BlockPool,
    prefix: PrefixIndex,
    host: HostTier,
    disk: DiskTier,
    transfers: transfers::Transfers,
    saves: saves::Saves,
    /// Contents that were named so far, on any tier.
    contents: u64,
    /// What the next step has to copy, in order.
    copies: Vec<BlockCopy>,
    /// How many more blocks the next step may copy out.
    offloads_allowed: u32,
    hasher: ChainHasher,
    block_tokens: u32,
    counters: CacheCounters,
    changes: Changes,
    /// Blocks from one named prefix to the next; 0 if none has a name.
    blocks_per_key: u32,
}

/// Where one block of a prefix was found.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Found {
    /// On the device.
    Device(BlockId),
    /// On the host alone.
    Host(HostBlockId),
}

/// A prefix that was found.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct PrefixHit {
    /// Blocks in order.
    pub blocks: Vec<Found>,
    /// How many of them, from the first on, are on the device.
    pub leading_device_blocks: usize,
    /// Content of the last of these: the parent of what comes behind them.
    pub content: Option<ContentId>,
}

impl BlockStore {
    /// A store of `total` free blocks, without a host tier.
    pub fn new(total: u32, block_tokens: u32, hasher: ChainHasher) -> Self {
        Self {
            pool: BlockPool::new(total),
            prefix: PrefixIndex::new(total, block_tokens),
            host: HostTier::new(0, block_tokens),
            disk: DiskTier::new(0, block_tokens),
            transfers: transfers::Transfers::default(),
            saves: saves::Saves::default(),
            contents: 0,
            copies: Vec::new(),
            offloads_allowed: 0,
            hasher,
            block_tokens,
            counters: CacheCounters::default(),
            changes: Changes::default(),
            blocks_per_key: PrefixKey::TOKENS / block_tokens,
        }
    }

    /// The same with a host tier of this many blocks.
    #[must_use]
    pub fn with_host_blocks(mut self, host_blocks: u32) -> Self {
        self.host = HostTier::new(host_blocks, self.block_tokens);
        self
    }

    /// Makes a store smaller whose device has not been used; what lies on the disk stays.
    ///
    /// # Panics
    /// If a block of the device is in use or has a content.
    pub fn shrink(&mut self, total: u32) {
        assert!(self.pool.free() == self.pool.total() && self.prefix.is_empty(), "blocks are in use");
        self.pool = BlockPool::new(total);
        self.prefix = PrefixIndex::new(total, self.block_tokens);
    }

    /// Blocks of the host tier.
    pub fn host_blocks(&self) -> u32 {
        self.host.total()
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

    /// Finds the longest cached prefix of the chain, on either tier. Takes nothing.
    pub fn find_prefix(&mut self, namespace: &Namespace, hashes: &[BlockHash], ids: &[Token]) -> PrefixHit {
        let mut hit = PrefixHit::default();
        let mut parent = None;
        for (hash, block_ids) in hashes.iter().zip(ids.chunks_exact(self.block_tokens as usize)) {
            if let Some((block, content)) = self.prefix.find(namespace, parent, hash, block_ids) {
                parent = Some(content);
                if hit.leading_device_blocks == hit.blocks.len() {
                    hit.leading_device_blocks += 1;
                    hit.content = parent;
                }
                hit.blocks.push(Found::Device(block));
            } else if let Some((block, content)) = self.host.prefix.find(namespace, parent, hash, block_ids) {
                parent = Some(content);
                hit.blocks.push(Found::Host(HostBlockId(block.0)));
            } else {
                break;
            }
        }
        self.counters.queried_tokens += hashes.len() as u64 * u64::from(self.block_tokens);
        hit
    }

    /// Takes a reference to each block of a prefix that was just found: those on the device are shared, those on the host
    /// pinned until they are restored or given up.
    pub fn take_prefix(&mut self, found: &[Found]) {
        for &found in found {
            match found {
                Found::Device(block) => self.pool.share(block),
                Found::Host(host) => self.host.pin(host),
            }
        }
        self.counters.hit_tokens += found.len() as u64 * u64::from(self.block_tokens);
    }

    /// Has a pinned host block copied into a block of the asker's, before the next step's rows, and unpins it.
    pub fn restore(&mut self, host: HostBlockId, block: BlockId) {
        assert!(self.pool.references(block) > 0, "block {block} is restored for nobody who holds it");
        let tag = self.host.tag(host);
        self.host.unpin(host);
        self.copies.push(BlockCopy { direction: CopyDirection::Restore, block, host, tag });
        self.counters.restored_blocks += 1;
    }

    /// Unpins a host block that is not restored after all.
    pub fn give_up_restore(&mut self, host: HostBlockId) {
        self.host.unpin(host);
    }

    /// How many blocks the step that is being planned may copy out.
    pub fn allow_offloads(&mut self, blocks: u32) {
        self.offloads_allowed = blocks;
    }

    /// How many blocks the step that is being planned has to copy so far.
    pub fn copies(&self) -> usize {
        self.copies.len()
    }

    /// What the step has to copy, in order.
    pub fn take_copies(&mut self) -> Vec<BlockCopy> {
        std::mem::take(&mut self.copies)
    }

    /// Takes one block for new content.
    pub fn allocate(&mut self) -> Option<BlockId> {
        let block = self.pool.allocate()?;
        if self.prefix.holds(block) {
            self.counters.evicted_blocks += 1;
            self.offload(block);
            let evicted = self.prefix.reachable(block).map(|(content, _)| content.clone());
            self.prefix.forget(block);
            self.say_lost(evicted);
        }
        Some(block)
    }

    /// Has what an evicted block holds copied to the host, if it is not there yet.
    fn offload(&mut self, block: BlockId) {
        let Some((content, ids)) = self.prefix.reachable(block) else { return };
        if let Some(host) = self.host.prefix.find_content(content, ids) {
            self.host.touch(HostBlockId(host.0));
            return;
        }
        if self.offloads_allowed == 0 || self.copies.len() >= Delta::MAX_COPIES {
            return;
        }
        let tag = content.tag();
        let Some((host, lost)) = self.host.take_in(content.clone(), ids) else { return };
        self.transfers.look_again();
        self.offloads_allowed -= 1;
        self.counters.offloaded_blocks += 1;
        let block = if Planted::OffloadsAnotherBlock.is_here() { BlockId(block.0 ^ 1) } else { block };
        self.copies.push(BlockCopy { direction: CopyDirection::Offload, block, host, tag });
        self.say_lost(lost);
    }

    /// A content left a tier: its name is gone unless another holds it too.
    fn say_lost(&mut self, lost: Lost) {
        if let Some(content) = lost
            && let Some(key) = content.name()
            && !self.has_name_anywhere(&content.hash)
        {
            self.changes.removed(key);
        }
    }

    /// Copies to these blocks were to be made by a step that is lost, or they do not hold what they should. They are not
    /// pinned.
    pub fn forget_host_blocks(&mut self, blocks: impl IntoIterator<Item = HostBlockId>) {
        for host in blocks {
            let lost = self.host.forget(host);
            self.say_lost(lost);
        }
    }

    /// Host blocks turned out to be bad: see `forget_host_blocks`.
    pub fn host_blocks_are_bad(&mut self, blocks: &[HostBlockId]) {
        self.counters.bad_host_blocks += blocks.len() as u64;
        self.forget_host_blocks(blocks.iter().copied());
    }

    /// The host tier's memory is another one. Nothing may be pinned.
    pub fn clear_host(&mut self) {
        let names: Vec<PrefixKey> = self.names_on_host_alone().collect();
        self.host.clear();
        for key in names {
            self.changes.removed(key);
        }
    }

    /// Makes a full, computed block findable by others. `index` is its place in the sequence's table. A block of the same
    /// content keeps its place: the older copy is the one that others already share. Returns the content that later blocks
    /// name as their parent.
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
        if let Some((_, content)) = self.prefix.find(namespace, parent, hash, ids) {
            return content;
        }
        if let Some(mut content) = self.prefix.content(block).cloned() {
            // It was found behind a block that was copied back, and the host has lost the parent's name since: the parent
            // has got a new one, and so does what builds on it, because a parent is always named before its children.
            content.id = self.next_content();
            content.parent = parent;
            let id = content.id;
            self.prefix.forget(block);
            self.prefix.insert(block, content, ids);
            return id;
        }
        // 0 divides nothing.
        let named = (index + 1).is_multiple_of(self.blocks_per_key);
        let below = self.content_below(namespace, parent, hash, ids);
        let id = below.unwrap_or_else(|| self.next_content());
        let known = self.has_name_anywhere(hash);
        let content = Content { id, parent, namespace: *namespace, hash: *hash, named };
        self.prefix.insert(block, content, ids);
        if named && !known {
            self.changes.stored(PrefixKey::of_hash(hash));
        }
        id
    }

    fn next_content(&mut self) -> ContentId {
        self.contents += 1;
        ContentId::new(self.contents).expect("starts at one")
    }

    /// Names a prefix every so many tokens instead of the usual number, before anything is cached.
    pub fn name_prefixes_every(&mut self, tokens: u32) {
        assert_eq!(self.named().count(), 0, "names are settled before the first");
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
        self.prefix.all_reachable().filter_map(Content::name).chain(self.names_below())
    }

    /// Names of what the device does not hold.
    fn names_below(&self) -> impl Iterator<Item = PrefixKey> {
        let above = |content: &&Content| !self.prefix.has_name(&content.hash);
        let on_host = self.host.prefix.all_reachable().filter(above).filter_map(Content::name);
        on_host.chain(self.names_on_disk_alone())
    }

    fn names_on_host_alone(&self) -> impl Iterator<Item = PrefixKey> {
        let alone =
            |content: &&Content| !self.prefix.has_name(&content.hash) && !self.disk.prefix.has_name(&content.hash);
        self.host.prefix.all_reachable().filter(alone).filter_map(Content::name)
    }

    /// Gives a table back, last block first, so that a prefix's children are reused before their parents.
    pub fn release(&mut self, table: &[BlockId]) {
        for &block in table.iter().rev() {
            let keep = self.prefix.holds(block);
            self.pool.release(block, keep);
        }
    }

    /// The device's memory is gone: all blocks are free, nothing is cached but below it. Tables held by anybody are void.
    pub fn reset(&mut self) {
        self.pool.reset();
        self.prefix.clear();
        self.changes.cleared();
        let left: Vec<PrefixKey> = self.names_below().collect();
        for key in left {
            self.changes.stored(key);
        }
    }

    /// Walks everything, given how often sequences reference each block. O(blocks), for tests and idle checks.
    pub fn check(&self, expected_references: impl Fn(BlockId) -> u32, expected_pins: impl Fn(HostBlockId) -> u32) {
        self.pool.check();
        let (hosts, disks, writing) = self.pins_of_transfers();
        self.host.check(|host| expected_pins(host) + hosts.get(&host).copied().unwrap_or(0), &writing);
        self.disk.check(|disk| disks.get(&disk).copied().unwrap_or(0));
        for block in (0..self.total()).map(BlockId) {
            let (held, expected) = (self.pool.references(block), expected_references(block));
            assert_eq!(held, expected, "block {block} has {held} references, the tables have {expected}");
        }
    }
}

#[cfg(test)]
mod tests;
