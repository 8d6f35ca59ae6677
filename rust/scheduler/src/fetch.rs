//! What comes back from the disk tier, and how much goes there. A waiting record whose prefix lies on the disk has it read
//! into places of the host first and stays out of steps until it is there, while others go by; it waits no longer than
//! computing would take, so a slow disk costs at most twice. What the host gives up next is written beside steps that run
//! anyway. A decision costs a few predictions and a walk along the prefix. Knows nothing of who reads or writes.

use crate::queue::Place;
use crate::record::Record;
use crate::replica::Replica;
use llmscale_blocks::DiskRecord;
use llmscale_types::{DiskBlockId, DiskReport, Duration, Epoch, HostBlockId, Time};

/// Records that wait for the disk at a time: each is passed over by every plan.
const MAX_FETCHES: usize = 64;
/// Where the disk does not seem to pay, or refuses, one in so many is tried all the same: it may have become faster, or have
/// room again.
const PER_TRIAL: u64 = 64;

/// Transfers are made in order, so writes under way delay a read: by this much at most.
const MAX_WRITE_DELAY_NS: u64 = 100_000_000;
/// Writes under way before anything was read.
const FIRST_WRITES: u32 = 64;

/// What one waiting record has read for it.
#[derive(Debug)]
pub(crate) struct Fetch {
    place: Place,
    /// Its last read.
    last: u64,
    /// Where to; pinned.
    pub(crate) hosts: Vec<HostBlockId>,
    /// When computing would have been as fast.
    gives_up: Time,
    /// It waits no longer, whatever has come.
    over: bool,
}

/// The scheduler's side of the disk tier.
#[derive(Debug, Default)]
pub(crate) struct DiskSide {
    pub(crate) fetches: Vec<Fetch>,
    /// Which incarnation of the files the records are about.
    incarnation: Option<u64>,
    /// How often reading or writing was found not to pay.
    declined: u64,
}

impl Replica {
    /// The same with what an earlier process left on the disk: the incarnation of its files and the records beside them.
    #[must_use]
    pub fn with_disk(mut self, incarnation: u64, records: Vec<(DiskBlockId, DiskRecord)>) -> Self {
        self.blocks.recall_disk(records);
        self.disk.incarnation = Some(incarnation);
        self
    }

    /// A fresh worker group has found these files.
    pub(crate) fn disk_up(&mut self, incarnation: u64) {
        if self.limits.disk_blocks > 0 && self.disk.incarnation.replace(incarnation) != Some(incarnation) {
            self.blocks.restart_disk(incarnation);
        }
    }

    /// Transfers have ended.
    pub(crate) fn disk_done(&mut self, report: &DiskReport) {
        if self.epoch != Some(report.epoch) {
            self.counters.stale_results += 1;
            return;
        }
        self.disk_cost.observe(report.read_blocks, report.read_ns);
        self.blocks.end_transfers(report);
        self.settle_fetches();
    }

    /// The steps in flight are lost, or the worker is: nobody knows what of the transfers was begun.
    pub(crate) fn void_disk(&mut self) {
        for fetch in std::mem::take(&mut self.disk.fetches) {
            self.blocks.unpin_read(&fetch.hosts);
        }
        self.blocks.void_transfers();
    }

    /// Drops what was read for records that wait no longer.
    pub(crate) fn settle_fetches(&mut self) {
        for at in (0..self.disk.fetches.len()).rev() {
            if self.queue.get(self.disk.fetches[at].place).is_none() {
                self.drop_fetch(at);
            }
        }
    }

    fn drop_fetch(&mut self, at: usize) {
        let fetch = self.disk.fetches.swap_remove(at);
        self.blocks.unpin_read(&fetch.hosts);
    }

    /// A record is admitted: it has pinned what it found by itself.
    pub(crate) fn end_fetch(&mut self, place: Place) {
        if let Some(at) = self.disk.fetches.iter().position(|fetch| fetch.place == place) {
            self.drop_fetch(at);
        }
    }

    /// Gives reads up that last as long as computing would have.
    pub(crate) fn expire_fetches(&mut self, now: Time) {
        for at in 0..self.disk.fetches.len() {
            let fetch = &mut self.disk.fetches[at];
            if fetch.gives_up <= now && !fetch.over {
                fetch.over = true;
                let hosts = std::mem::take(&mut fetch.hosts);
                let late = self.blocks.is_under_way(fetch.last);
                self.counters.late_fetches += u64::from(late);
                self.blocks.unpin_read(&hosts);
            }
        }
    }

    /// When the next read is to be given up.
    pub(crate) fn next_fetch_deadline(&self) -> Option<Time> {
        self.disk.fetches.iter().filter(|fetch| !fetch.over).map(|fetch| fetch.gives_up).min()
    }

    /// The first waiting record that does not wait for the disk; those before it begin to, if it pays.
    pub(crate) fn next_to_admit(&mut self) -> Option<Place> {
        if self.limits.disk_blocks == 0 {
            return self.queue.first().map(Record::place);
        }
        self.settle_fetches();
        let mut started = None;
        for record in self.queue.ordinary() {
            let place = record.place();
            match self.disk.fetches.iter().find(|fetch| fetch.place == place) {
                Some(fetch) if !fetch.over && self.blocks.is_under_way(fetch.last) => {}
                Some(_) => return Some(place),
                None if self.disk.fetches.len() >= MAX_FETCHES => return Some(place),
                None => {
                    started = Some((place, self.run_on_disk(record)));
                    break;
                }
            }
        }
        let (place, run) = started?;
        if run.is_empty() || !self.begin_fetch(place, &run) {
            return Some(place);
        }
        self.next_to_admit()
    }

    fn run_on_disk(&self, record: &Record) -> Vec<DiskBlockId> {
        let context = &record.submission.context;
        let hashes = &record.hashes[..self.shareable_blocks(record, context.len())];
        self.blocks.disk_run(&record.submission.namespace, hashes, context)
    }

    /// Begins to read for a record, unless computing is cheaper. Whether it waits now.
    fn begin_fetch(&mut self, place: Place, run: &[DiskBlockId]) -> bool {
        let blocks = run.len() as u32;
        let ahead = self.blocks.transfers_under_way();
        let reading_ns = self.disk_cost.predict(ahead + blocks) + self.copy_cost.predict(blocks);
        let computing_ns = self.copy_prices().prefill_ns(blocks * self.limits.block_tokens);
        // What was hardly read has no price yet; the first reads tell, one at a time.
        let cheap = self.disk_cost.is_known() && reading_ns < computing_ns;
        let pays = cheap || (!self.disk_cost.is_settled() && self.disk.fetches.is_empty());
        if !pays && !self.is_trial(ahead) {
            return false;
        }
        let (hosts, last) = self.blocks.begin_reads(run);
        if hosts.is_empty() {
            return false;
        }
        let patience = Duration((computing_ns.max(reading_ns) / 1_000).max(1));
        self.disk.fetches.push(Fetch { place, last, hosts, gives_up: self.now + patience, over: false });
        true
    }

    /// Whether something is done though it does not seem to pay.
    fn is_trial(&mut self, under_way: u32) -> bool {
        self.disk.declined += 1;
        under_way == 0 && self.disk.declined.is_multiple_of(PER_TRIAL)
    }

    /// Has what the host gives up next written, beside a step that is sent anyway. Not what is computed faster than it is
    /// read back, and not while the disk refuses.
    pub(crate) fn plan_writes(&mut self) {
        if !self.blocks.has_writes_due() || self.is_saving() {
            return;
        }
        let pays = self.writing_pays() && !self.blocks.disk_refuses();
        let read_within = self.disk_cost.blocks_within(MAX_WRITE_DELAY_NS).max(1);
        let at_once = if self.disk_cost.is_known() { read_within } else { FIRST_WRITES };
        let most = if pays { at_once } else { u32::from(self.is_trial(0)) };
        if most > 0 {
            self.blocks.begin_writes(most);
        }
    }

    /// Whether a block is read back faster than it is computed, as far as that is known.
    pub(crate) fn writing_pays(&self) -> bool {
        let back_ns = self.disk_cost.predict(1) + self.copy_cost.predict(1);
        !self.disk_cost.is_settled() || back_ns < self.copy_prices().block_ns()
    }

    /// Whether a record waits for the disk, or a drain.
    pub fn waits_for_disk(&self) -> bool {
        let waits = |fetch: &Fetch| !fetch.over && self.blocks.is_under_way(fetch.last);
        self.drain_waits() || self.disk.fetches.iter().any(waits)
    }

    /// Which incarnation of the files the records are about; for tests.
    pub fn disk_incarnation(&self) -> Option<u64> {
        self.disk.incarnation
    }

    /// The incarnation of a worker group that lives, as far as it is known here.
    pub fn epoch(&self) -> Option<Epoch> {
        self.epoch
    }
}
