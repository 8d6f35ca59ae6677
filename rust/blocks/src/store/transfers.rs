//! What goes between the host tier and the disk tier, beside the steps: contents that the host will need the room of are
//! written ahead of that, and what somebody asks for is read into places on the host that are pinned until it is there.
//! Transfers end in the order in which they were asked for, so one number says how far they are. A content can be found on a
//! tier when its transfer has ended, and not before. O(1) per transfer. Knows not who makes them, nor when they pay.

use super::BlockStore;
use crate::chain::{BlockHash, Namespace};
use crate::disk::{DiskRecord, DiskTier, IndexChange};
use crate::prefix::{Content, ContentId};
use llmscale_types::{
    Delta, DiskBlockId, DiskDirection, DiskReport, DiskTransfer, HostBlockId, Planted, PrefixKey, Token,
};
use rustc_hash::{FxHashMap, FxHashSet};
use std::collections::VecDeque;

/// Writes under way at most, whoever asks.
pub(super) const MAX_WRITES: u32 = 128;
/// Of the host tier, the part that is written before its room is needed; bounded, because it is searched.
const WRITTEN_PART: u32 = 2;
const MAX_WRITTEN_PART: u32 = 256;

/// A transfer that was asked for and has not ended, as far as anybody knows.
#[derive(Debug)]
struct Pending {
    transfer: DiskTransfer,
    content: Content,
    ids: Box<[Token]>,
}

/// See the file's header.
#[derive(Debug, Default)]
pub(super) struct Transfers {
    pending: VecDeque<Pending>,
    /// What the next step tells the ranks.
    asked: Vec<DiskTransfer>,
    /// Number of the transfer that was asked for last.
    last: u64,
    pub(super) writes: u32,
    /// By disk block: the number of the read that is under way, and where to.
    reading: FxHashMap<DiskBlockId, (u64, HostBlockId)>,
    /// The host may hold something to write that was not looked at.
    writes_due: bool,
    /// The last writes failed.
    pub(super) refused: bool,
    changes: Vec<IndexChange>,
}

/// How often the transfers under way pin each place of the host and of the disk, and which of the host's are being written.
type TransferPins = (FxHashMap<HostBlockId, u32>, FxHashMap<DiskBlockId, u32>, FxHashSet<HostBlockId>);

impl Transfers {
    /// The host tier holds something new, or in another order.
    pub(super) fn look_again(&mut self) {
        self.writes_due = true;
    }
}

impl BlockStore {
    /// The same with a disk tier of this many blocks.
    #[must_use]
    pub fn with_disk_blocks(mut self, disk_blocks: u32) -> Self {
        self.disk = DiskTier::new(disk_blocks, self.block_tokens);
        self
    }

    /// Takes up what the disk held before this process began, before anything is cached.
    pub fn recall_disk(&mut self, records: Vec<(DiskBlockId, DiskRecord)>) {
        assert_eq!(self.contents, 0, "the disk is recalled before the first content");
        let (last, dropped) = self.disk.recall(&self.hasher, records, self.blocks_per_key);
        self.contents = last;
        self.transfers.changes.extend(dropped.into_iter().map(IndexChange::Drop));
    }

    /// Blocks on the disk, in order, that continue the chain where no tier above has it.
    pub fn disk_run(&self, namespace: &Namespace, hashes: &[BlockHash], ids: &[Token]) -> Vec<DiskBlockId> {
        let (mut parent, mut run) = (None, Vec::new());
        for (hash, block_ids) in hashes.iter().zip(ids.chunks_exact(self.block_tokens as usize)) {
            let above = self.prefix.find(namespace, parent, hash, block_ids);
            let above = above.or_else(|| self.host.prefix.find(namespace, parent, hash, block_ids));
            if let Some((_, content)) = above {
                parent = Some(content);
            } else if let Some((block, content)) = self.disk.prefix.find(namespace, parent, hash, block_ids) {
                parent = Some(content);
                run.push(DiskBlockId(block.0));
            } else {
                break;
            }
        }
        run
    }

    /// Has blocks of the disk read into places of the host that stay pinned until `unpin_read`, as many from the first on as
    /// there is room for. Returns the places, and the number of the last transfer that they wait for.
    pub fn begin_reads(&mut self, run: &[DiskBlockId]) -> (Vec<HostBlockId>, u64) {
        let (mut places, mut last) = (Vec::with_capacity(run.len()), 0);
        for &disk in run {
            if let Some(&(number, host)) = self.transfers.reading.get(&disk) {
                self.host.pin(host);
                places.push(host);
                last = last.max(number);
                continue;
            }
            // Half of the host stays for what is evicted and restored meanwhile.
            let full = self.transfers.pending.len() >= Delta::MAX_TRANSFERS;
            if full || self.host.pinned() >= (self.host.total() / 2).max(1) {
                break;
            }
            let Some((content, ids)) = self.disk.held(disk) else { break };
            let (content, ids) = (content.clone(), Box::from(ids));
            let Some((host, lost)) = self.host.reserve() else { break };
            self.say_lost(lost);
            self.host.pin(host);
            self.disk.pin(disk);
            last = self.ask(DiskDirection::Read, host, disk, content, ids);
            self.transfers.reading.insert(disk, (last, host));
            places.push(host);
        }
        (places, last)
    }

    /// Whether the transfer of this number, or one before it, is under way.
    pub fn is_under_way(&self, number: u64) -> bool {
        let first = self.transfers.pending.front();
        first.is_some_and(|first| first.transfer.number <= number) && !Planted::RestoresBeforeItIsRead.is_here()
    }

    /// How many transfers are under way.
    pub fn transfers_under_way(&self) -> u32 {
        self.transfers.pending.len() as u32
    }

    /// Takes the pins of `begin_reads` back.
    pub fn unpin_read(&mut self, places: &[HostBlockId]) {
        for &host in places.iter().rev() {
            self.host.unpin(host);
        }
    }

    /// Whether something on the host may have to be written.
    pub fn has_writes_due(&self) -> bool {
        self.transfers.writes_due && self.disk.total() > 0
    }

    /// Whether the disk has refused the last writes.
    pub fn disk_refuses(&self) -> bool {
        self.transfers.refused
    }

    /// Has what the host gives up next written to the disk, as far as it is not there, so that `most` blocks are under way.
    pub fn begin_writes(&mut self, most: u32) {
        // A smaller disk would take turns with the same blocks for ever, each write taking the place of the next.
        let part = (self.host.total() / WRITTEN_PART).clamp(1, MAX_WRITTEN_PART).min(self.disk.total().max(1));
        let room = most.min(MAX_WRITES).min(part).saturating_sub(self.transfers.writes) as usize;
        let room = room.min(Delta::MAX_TRANSFERS.saturating_sub(self.transfers.pending.len()));
        let due: Vec<HostBlockId> = self
            .host
            .oldest()
            .take(part as usize)
            .filter(|&host| {
                let held = self.host.held(host).filter(|_| !self.host.is_writing(host));
                held.is_some_and(|(content, ids)| self.disk.prefix.find_content(content, ids).is_none())
            })
            .collect();
        self.transfers.writes_due = due.len() > room;
        for host in due.into_iter().take(room) {
            if !self.begin_write(host) {
                break;
            }
        }
    }

    /// Has what a block of the host holds written to the place of the disk that was not asked for for longest. False if every
    /// place is pinned.
    pub(super) fn begin_write(&mut self, host: HostBlockId) -> bool {
        let (content, ids) = self.host.held(host).expect("it was just looked at");
        let (content, ids) = (content.clone(), Box::from(ids));
        let Some((disk, lost)) = self.disk.reserve() else { return false };
        self.transfers.changes.push(IndexChange::Drop(disk));
        self.say_lost(lost);
        self.host.begin_write(host);
        self.transfers.writes += 1;
        self.ask(DiskDirection::Write, host, disk, content, ids);
        true
    }

    fn ask(
        &mut self,
        direction: DiskDirection,
        host: HostBlockId,
        disk: DiskBlockId,
        content: Content,
        ids: Box<[Token]>,
    ) -> u64 {
        let number = self.transfers.last + 1;
        let transfer = DiskTransfer { number, direction, host, disk, tag: content.tag() };
        if Planted::RestoresBeforeItIsRead.is_here() && direction == DiskDirection::Read {
            self.host.hold(host, content.clone(), &ids);
        }
        self.transfers.last = number;
        self.transfers.asked.push(transfer);
        self.transfers.pending.push_back(Pending { transfer, content, ids });
        number
    }

    /// What the next step tells the ranks.
    pub fn take_transfers(&mut self) -> Vec<DiskTransfer> {
        std::mem::take(&mut self.transfers.asked)
    }

    /// How many transfers the next step tells the ranks of.
    pub fn asked_transfers(&self) -> usize {
        self.transfers.asked.len()
    }

    /// Transfers have ended, well or not.
    pub fn end_transfers(&mut self, report: &DiskReport) {
        while let Some(pending) =
            self.transfers.pending.pop_front_if(|pending| pending.transfer.number <= report.through)
        {
            let done = !report.failed.contains(&pending.transfer.number);
            match pending.transfer.direction {
                DiskDirection::Write => self.end_write(pending, done || Planted::BelievesInFailedWrites.is_here()),
                DiskDirection::Read => self.end_read(pending, done),
            }
        }
        self.transfers.refused |= report.refused;
        self.counters.disk_waits += u64::from(report.waits);
    }

    fn end_write(&mut self, pending: Pending, done: bool) {
        let Pending { transfer, content, ids } = pending;
        self.transfers.writes -= 1;
        self.transfers.writes_due = true;
        // What is saved goes through few places of the host, so that the others' contents stay until their turn.
        self.host.end_write(transfer.host, self.saves.has_begun());
        if done {
            self.counters.disk_written_blocks += 1;
            self.transfers.refused = false;
            let record = DiskRecord {
                id: content.id,
                parent: content.parent,
                namespace: content.namespace,
                hash: content.hash,
                ids: ids.clone(),
            };
            self.transfers.changes.push(IndexChange::Put(transfer.disk, Box::new(record)));
            self.say_found(&content);
            self.disk.hold(transfer.disk, content, &ids);
        } else {
            self.counters.failed_disk_writes += 1;
        }
        self.disk.unpin(transfer.disk);
    }

    fn end_read(&mut self, pending: Pending, done: bool) {
        let Pending { transfer, content, ids } = pending;
        self.transfers.reading.remove(&transfer.disk);
        if done {
            self.counters.disk_read_blocks += 1;
            if !Planted::RestoresBeforeItIsRead.is_here() {
                self.say_found(&content);
                self.host.hold(transfer.host, content, &ids);
            }
        }
        self.host.unpin(transfer.host);
        self.disk.unpin(transfer.disk);
        if !done {
            self.counters.bad_disk_blocks += 1;
            let lost = self.disk.forget(transfer.disk);
            self.transfers.changes.push(IndexChange::Drop(transfer.disk));
            self.say_lost(lost);
        }
    }

    /// A content is about to be held by a tier. Its name may have gone meanwhile: what was computed again after a lost parent
    /// hides an older copy of the same hash, and takes the name with it when it gives way.
    fn say_found(&mut self, content: &Content) {
        if let Some(key) = content.name()
            && !self.has_name_anywhere(&content.hash)
        {
            self.changes.stored(key);
        }
    }

    /// Nobody knows what becomes of the transfers under way, and nobody has pinned what they are to read: what they were to
    /// bring is not there. A rank that makes one of them all the same keeps to the order of what it is told.
    pub fn void_transfers(&mut self) {
        self.transfers.asked.clear();
        self.transfers.reading.clear();
        self.transfers.writes = 0;
        self.transfers.writes_due = true;
        while let Some(pending) = self.transfers.pending.pop_back() {
            let DiskTransfer { host, disk, direction, .. } = pending.transfer;
            match direction {
                DiskDirection::Write => self.host.end_write(host, false),
                DiskDirection::Read => self.host.unpin(host),
            }
            self.disk.unpin(disk);
        }
    }

    /// The disk tier's files are others. Nothing may be under way.
    pub fn restart_disk(&mut self, incarnation: u64) {
        let names: Vec<PrefixKey> = self.names_on_disk_alone().collect();
        self.disk.clear();
        for key in names {
            self.changes.removed(key);
        }
        self.transfers.changes.clear();
        self.transfers.changes.push(IndexChange::Restart(incarnation));
        self.transfers.writes_due = true;
    }

    /// What has to be changed in the records beside the files, in order.
    pub fn take_index_changes(&mut self) -> Vec<IndexChange> {
        std::mem::take(&mut self.transfers.changes)
    }

    pub(super) fn names_on_disk_alone(&self) -> impl Iterator<Item = PrefixKey> {
        let alone =
            |content: &&Content| !self.prefix.has_name(&content.hash) && !self.host.prefix.has_name(&content.hash);
        self.disk.prefix.all_reachable().filter(alone).filter_map(Content::name)
    }

    /// The content of a block that is below the device, if it is.
    pub(super) fn content_below(
        &self,
        namespace: &Namespace,
        parent: Option<ContentId>,
        hash: &BlockHash,
        ids: &[Token],
    ) -> Option<ContentId> {
        let on_host = self.host.prefix.find(namespace, parent, hash, ids);
        on_host.or_else(|| self.disk.prefix.find(namespace, parent, hash, ids)).map(|(_, content)| content)
    }

    /// How often transfers pin a block of the host, and how often one of the disk.
    pub(super) fn pins_of_transfers(&self) -> TransferPins {
        let (mut hosts, mut disks, mut writing) = TransferPins::default();
        for Pending { transfer, .. } in &self.transfers.pending {
            *disks.entry(transfer.disk).or_default() += 1;
            match transfer.direction {
                DiskDirection::Read => *hosts.entry(transfer.host).or_default() += 1,
                DiskDirection::Write => assert!(writing.insert(transfer.host), "it is written twice at once"),
            }
        }
        (hosts, disks, writing)
    }

    /// Whether any tier holds a named prefix of this hash.
    pub(super) fn has_name_anywhere(&self, hash: &BlockHash) -> bool {
        [&self.prefix, &self.host.prefix, &self.disk.prefix].iter().any(|tier| tier.has_name(hash))
    }
}
