//! The disk of a simulated node: what each place of the disk tier's file holds, and the transfers that are under way, which end
//! one by one in the order in which they were asked for. It outlives workers and nodes. A transfer that a death cut off and a
//! bit that flipped leave a block whose checksum does not agree; a full disk takes nothing in. O(tokens) per transfer. Knows
//! nothing of time, or of who asks.

use crate::host_memory::{HostBlock, HostMemory};
use llmscale_blocks::{DiskRecord, IndexChange};
use llmscale_types::{BlockCopy, CopyDirection, DiskBlockId, DiskDirection, DiskReport, DiskTransfer, Epoch, Planted};
use std::collections::{BTreeMap, VecDeque};

/// See the file's header.
#[derive(Clone, Debug)]
pub struct DiskMemory {
    /// Which file it is: another one has another number.
    incarnation: u64,
    places: Vec<Option<HostBlock>>,
    queue: VecDeque<DiskTransfer>,
    /// It takes nothing in.
    pub(crate) full: bool,
    /// The end of a transfer is planned.
    pub(crate) moves: bool,
    ended: Ended,
}

/// What was not reported yet.
#[derive(Clone, Debug, Default)]
struct Ended {
    through: u64,
    failed: Vec<u64>,
    refused: bool,
    read_blocks: u32,
    waits: u32,
    news: bool,
}

impl DiskMemory {
    /// An empty file.
    pub fn new(disk_blocks: u32, incarnation: u64) -> Self {
        let places = vec![None; disk_blocks as usize];
        Self { incarnation, places, queue: VecDeque::new(), full: false, moves: false, ended: Ended::default() }
    }

    /// Its number.
    pub fn incarnation(&self) -> u64 {
        self.incarnation
    }

    /// Takes transfers in.
    pub(crate) fn ask(&mut self, transfers: &[DiskTransfer]) {
        self.queue.extend(transfers);
    }

    /// Transfers that have not ended.
    pub fn under_way(&self) -> usize {
        self.queue.len()
    }

    /// Makes what stands in the way of a step's copies, which wait for it.
    pub(crate) fn settle(&mut self, copies: &[BlockCopy], host: &mut HostMemory) {
        for copy in copies {
            let stands = |transfer: &DiskTransfer| {
                let overwrites = copy.direction == CopyDirection::Offload;
                transfer.host == copy.host && (overwrites || transfer.direction == DiskDirection::Read)
            };
            self.ended.waits += u32::from(self.queue.iter().any(stands));
            while self.queue.iter().any(stands) {
                self.end_one(host);
            }
        }
    }

    /// The oldest transfer ends.
    pub(crate) fn end_one(&mut self, host: &mut HostMemory) {
        let Some(transfer) = self.queue.pop_front() else { return };
        let DiskTransfer { number, direction, host: at, disk, tag } = transfer;
        let place = &mut self.places[disk.index()];
        let done = match direction {
            DiskDirection::Write => {
                let block = host.block(at).clone().filter(|block| block.tag == tag && !self.full);
                self.ended.refused |= self.full;
                let done = block.is_some();
                if done {
                    *place = block;
                }
                done
            }
            DiskDirection::Read => {
                let fits =
                    |block: &HostBlock| (block.intact && block.tag == tag) || Planted::LooksAtNoDiskHeader.is_here();
                let block = place.clone().filter(fits).map(|block| HostBlock { tag, intact: true, ..block });
                self.ended.read_blocks += 1;
                let done = block.is_some();
                *host.block(at) = block;
                done
            }
        };
        if !done {
            self.ended.failed.push(number);
        }
        self.ended.through = number;
        self.ended.news = true;
    }

    /// What has become of transfers since the last report, if anything.
    pub fn report(&mut self, epoch: Epoch, read_ns: u64) -> Option<DiskReport> {
        if !self.ended.news {
            return None;
        }
        let Ended { through, failed, refused, read_blocks, waits, .. } = std::mem::take(&mut self.ended);
        self.ended.through = through;
        let read_ns = read_ns * u64::from(read_blocks);
        Some(DiskReport { epoch, through, failed, refused, read_blocks, read_ns, waits })
    }

    /// The process that moved blocks is dead: the transfer that it was at is torn, the others never were. Returns whether a
    /// place was.
    pub(crate) fn tear(&mut self, host: &mut HostMemory) -> bool {
        let first = std::mem::take(&mut self.queue).pop_front();
        self.ended = Ended::default();
        self.moves = false;
        let Some(transfer) = first else { return false };
        let torn = Some(HostBlock { tag: transfer.tag, values: Vec::new(), intact: false });
        match transfer.direction {
            DiskDirection::Write => self.places[transfer.disk.index()] = torn,
            DiskDirection::Read => *host.block(transfer.host) = torn,
        }
        transfer.direction == DiskDirection::Write
    }

    /// A bit flips in the first place from `place` on that holds something. Returns whether there is one.
    pub fn flip(&mut self, place: usize) -> bool {
        let middle = place.min(self.places.len());
        let (before, behind) = self.places.split_at_mut(middle);
        let block = behind.iter_mut().chain(before).flatten().find(|block| block.intact);
        block.is_some_and(|block| {
            block.flip();
            true
        })
    }
}

/// What a node keeps beside its disk, as the next process reads it.
#[derive(Clone, Debug, Default)]
pub struct DiskBook {
    /// Which files it is about; 0 for none.
    pub incarnation: u64,
    records: BTreeMap<DiskBlockId, DiskRecord>,
    /// Changes that are not written yet.
    behind: VecDeque<IndexChange>,
}

impl DiskBook {
    /// Takes changes in; those of earlier rounds are written by now.
    pub fn note(&mut self, changes: Vec<IndexChange>) {
        if changes.is_empty() {
            return;
        }
        self.write(usize::MAX);
        self.behind.extend(changes);
    }

    fn write(&mut self, most: usize) {
        for change in self.behind.drain(..most.min(self.behind.len())) {
            match change {
                IndexChange::Put(disk, record) => drop(self.records.insert(disk, *record)),
                IndexChange::Drop(disk) => drop(self.records.remove(&disk)),
                IndexChange::Restart(incarnation) => {
                    self.records.clear();
                    self.incarnation = incarnation;
                }
            }
        }
    }

    /// The process is dead: this many of the last changes were written still. Returns how many were lost.
    pub fn cut(&mut self, written: usize) -> usize {
        self.write(written);
        std::mem::take(&mut self.behind).len()
    }

    /// Everything that it says.
    pub fn records(&self) -> Vec<(DiskBlockId, DiskRecord)> {
        self.records.iter().map(|(&disk, record)| (disk, record.clone())).collect()
    }
}
