//! One rank's disk thread: makes transfers between the host tier and the disk in the order in which they are asked for,
//! beside the steps. Whoever is about to touch a place of the host that a transfer is about waits for it first, so what is
//! copied never depends on how fast the disk is. The queue is bounded: what does not fit fails at once. O(1) per transfer
//! beside its bytes. Knows nothing of steps or engines.

use crate::disk_region::{DiskRegion, TransferError};
use crate::host_region::HostRegion;
use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Transfers that wait at most.
pub const MAX_QUEUE: usize = 1 << 13;

/// Which way.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Way {
    /// From the host to the disk.
    Write,
    /// From the disk to the host.
    Read,
}

/// One transfer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Job {
    /// Its number; they rise.
    pub number: u64,
    /// Which way.
    pub way: Way,
    /// The block on the host.
    pub host: u32,
    /// The block on the disk.
    pub disk: u32,
    /// Names the content.
    pub tag: u64,
}

/// What has become of transfers since the last report.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Ended {
    /// Every transfer up to this number has ended.
    pub through: u64,
    /// Those that failed.
    pub failed: Vec<u64>,
    /// Whether the system refused a write.
    pub refused: bool,
    /// Blocks that were read.
    pub read_blocks: u32,
    /// Time that reading them took.
    pub read_ns: u64,
    /// How often somebody waited for a place of the host.
    pub waits: u32,
}

#[derive(Debug, Default)]
struct State {
    /// With whether they were refused at once, for want of room.
    jobs: VecDeque<(Job, bool)>,
    /// By block of the host: reads into it, and writes from it, that have not ended.
    hosts: HashMap<u32, (u32, u32)>,
    ended: Ended,
    /// Whether there is something to report.
    news: bool,
    /// What the system said when it first refused, until somebody asks.
    trouble: Option<String>,
    troubled: bool,
    closing: bool,
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// See the file's header.
#[derive(Debug)]
pub struct DiskThread {
    shared: Arc<Shared>,
    blocks: (u32, u32),
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl DiskThread {
    /// Starts it. `host` is a mapping of its own of the memory that steps copy to and from.
    pub fn start(disk: DiskRegion, host: HostRegion) -> std::io::Result<Self> {
        let shared = Arc::new(Shared::default());
        let blocks = (host.blocks(), disk.blocks());
        let own = Arc::clone(&shared);
        let thread = std::thread::Builder::new().name("llmscale-disk".into()).spawn(move || run(&own, &disk, host))?;
        Ok(Self { shared, blocks, thread: Mutex::new(Some(thread)) })
    }

    /// Asks for transfers, in order. False, and nothing is asked for, if one names a block that does not exist.
    #[must_use]
    pub fn ask(&self, jobs: &[Job]) -> bool {
        let (hosts, disks) = self.blocks;
        if !jobs.iter().all(|job| job.host < hosts && job.disk < disks) {
            return false;
        }
        let mut state = self.shared.lock();
        for &job in jobs {
            if state.jobs.len() >= MAX_QUEUE {
                // It ends when those before it have.
                state.jobs.push_back((job, true));
            } else {
                let (reads, writes) = state.hosts.entry(job.host).or_default();
                *(if job.way == Way::Read { reads } else { writes }) += 1;
                state.jobs.push_back((job, false));
            }
        }
        self.shared.changed.notify_all();
        true
    }

    /// Waits until no transfer stands in the way of reading this block of the host, or of overwriting it, at most so long.
    /// False if one still does.
    #[must_use]
    pub fn settle(&self, host: u32, overwrites: bool, most: Duration) -> bool {
        let free = |state: &State| {
            state.hosts.get(&host).is_none_or(|&(reads, writes)| reads == 0 && (writes == 0 || !overwrites))
        };
        let mut state = self.shared.lock();
        if free(&state) {
            return true;
        }
        state.ended.waits += 1;
        self.wait_until(state, most, free)
    }

    /// Waits until nothing is left to do, at most so long, and forgets what has become of it: another engine asks from now on.
    #[must_use]
    pub fn begin(&self, most: Duration) -> bool {
        let idle = self.wait_until(self.shared.lock(), most, |state| state.jobs.is_empty());
        let mut state = self.shared.lock();
        state.ended = Ended::default();
        state.news = false;
        idle
    }

    /// What has become of transfers since the last call, if anything.
    pub fn report(&self) -> Option<Ended> {
        let mut state = self.shared.lock();
        if !std::mem::take(&mut state.news) {
            return None;
        }
        let through = state.ended.through;
        Some(std::mem::replace(&mut state.ended, Ended { through, ..Ended::default() }))
    }

    /// Waits until there is something to report, at most so long.
    pub fn wait_for_news(&self, most: Duration) -> bool {
        self.wait_until(self.shared.lock(), most, |state| state.news)
    }

    /// Whether transfers are under way, or have ended and nobody knows.
    pub fn is_busy(&self) -> bool {
        let state = self.shared.lock();
        state.news || !state.jobs.is_empty()
    }

    /// Ends the thread and lets go of the file. What waits is not made: an engine that has gone asks nobody.
    pub fn close(&self) {
        self.shared.lock().closing = true;
        self.shared.changed.notify_all();
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(thread) = thread {
            let outcome = thread.join();
            assert!(outcome.is_ok() || std::thread::panicking(), "the disk thread panicked");
        }
    }

    /// What the system said when it refused for the first time; once.
    pub fn take_trouble(&self) -> Option<String> {
        self.shared.lock().trouble.take()
    }

    fn wait_until(&self, mut state: MutexGuard<'_, State>, most: Duration, met: impl Fn(&State) -> bool) -> bool {
        let deadline = Instant::now() + most;
        while !met(&state) {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() || state.closing {
                return false;
            }
            state = self.shared.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }
}

impl Drop for DiskThread {
    fn drop(&mut self) {
        self.close();
    }
}

fn run(shared: &Shared, disk: &DiskRegion, mut host: HostRegion) {
    loop {
        let mut state = shared.lock();
        let (job, refused) = loop {
            if state.closing {
                return;
            }
            match state.jobs.front() {
                Some(&next) => break next,
                None => state = shared.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
            }
        };
        drop(state);
        if refused {
            end(shared, &job, Err(TransferError::Bad), None);
        } else {
            let (outcome, read_ns) = make(&job, disk, &mut host);
            release(shared, &job);
            end(shared, &job, outcome, read_ns);
        }
    }
}

fn make(job: &Job, disk: &DiskRegion, host: &mut HostRegion) -> (Result<(), TransferError>, Option<u64>) {
    let started = Instant::now();
    match job.way {
        Way::Write => (disk.write(job.disk, job.tag, host, job.host), None),
        Way::Read => {
            let outcome = disk.read(job.disk, job.tag, host, job.host);
            (outcome, Some(started.elapsed().as_nanos() as u64))
        }
    }
}

/// Its place on the host is nobody's business any more.
fn release(shared: &Shared, job: &Job) {
    let mut state = shared.lock();
    if let Some((reads, writes)) = state.hosts.get_mut(&job.host) {
        *(if job.way == Way::Read { &mut *reads } else { &mut *writes }) -= 1;
        if (*reads, *writes) == (0, 0) {
            state.hosts.remove(&job.host);
        }
    }
}

fn end(shared: &Shared, job: &Job, outcome: Result<(), TransferError>, read_ns: Option<u64>) {
    let mut state = shared.lock();
    let ended = &mut state.ended;
    ended.through = job.number;
    if let Some(read_ns) = read_ns {
        ended.read_blocks += 1;
        ended.read_ns = ended.read_ns.saturating_add(read_ns);
    }
    if outcome.is_err() {
        ended.failed.push(job.number);
    }
    if let Err(TransferError::Refused(kind)) = outcome {
        ended.refused |= job.way == Way::Write;
        if !state.troubled {
            state.troubled = true;
            let what = if job.way == Way::Write { "written to" } else { "read from" };
            state.trouble = Some(format!("the disk tier cannot be {what}: {kind}"));
        }
    }
    state.jobs.pop_front();
    state.news = true;
    drop(state);
    shared.changed.notify_all();
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk_region::tests::{BLOCK_BYTES, Folder, block};
    use std::time::Duration;

    const LONG: Duration = Duration::from_secs(30);

    fn job(number: u64, way: Way, host: u32, disk: u32) -> Job {
        Job { number, way, host, disk, tag: 40 + u64::from(disk) }
    }

    fn start(folder: &Folder) -> (DiskThread, HostRegion) {
        let thread = DiskThread::start(folder.disk(9, 5).unwrap(), folder.host(9)).unwrap();
        (thread, folder.host(9))
    }

    fn end(thread: &DiskThread, through: u64) -> Ended {
        let mut all = Ended::default();
        while all.through < through {
            assert!(thread.wait_for_news(LONG));
            let Some(report) = thread.report() else { continue };
            all.through = report.through;
            all.failed.extend(report.failed);
            all.refused |= report.refused;
            all.read_blocks += report.read_blocks;
            all.waits += report.waits;
        }
        all
    }

    #[test]
    fn a_block_goes_out_and_comes_back_while_others_go_on() {
        let folder = Folder::new("thread");
        let (thread, mut host) = start(&folder);
        host.offload(1, 43, &block(7));
        assert!(thread.ask(&[job(1, Way::Write, 1, 3), job(2, Way::Read, 0, 3), job(3, Way::Read, 2, 1)]));
        let ended = end(&thread, 3);
        assert_eq!((ended.failed, ended.refused, ended.read_blocks), (vec![3], false, 2));
        let mut back = vec![0; BLOCK_BYTES];
        assert!(host.restore(0, 43, &mut back) && back == block(7));
        assert!(!host.restore(2, 41, &mut back), "nothing was ever written there");
        assert!(!thread.is_busy());
    }

    #[test]
    fn whoever_touches_a_place_waits_for_the_transfers_about_it_and_for_no_others() {
        let folder = Folder::new("waits");
        let (thread, mut host) = start(&folder);
        host.offload(1, 43, &block(7));
        assert!(thread.ask(&[job(1, Way::Write, 1, 3)]));
        assert!(thread.settle(0, true, Duration::ZERO), "nothing is about this one");
        assert!(thread.settle(1, true, LONG));
        host.offload(1, 44, &block(8));
        assert!(thread.ask(&[job(2, Way::Read, 2, 3)]) && thread.settle(2, false, LONG));
        let mut back = vec![0; BLOCK_BYTES];
        assert!(host.restore(2, 43, &mut back) && back == block(7));
    }

    #[test]
    fn a_block_that_does_not_exist_is_refused_and_a_new_engine_begins_with_nothing() {
        let folder = Folder::new("begin");
        let (thread, _) = start(&folder);
        assert!(!thread.ask(&[job(1, Way::Read, 0, 99)]) && !thread.ask(&[job(1, Way::Read, 99, 0)]));
        assert!(thread.ask(&[job(7, Way::Read, 0, 1)]) && thread.begin(LONG));
        assert_eq!((thread.report(), thread.is_busy()), (None, false));
    }
}
