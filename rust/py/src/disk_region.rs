//! The door to the disk tier of one rank: its file, and the thread that moves blocks between it and the host tier's memory
//! beside the steps. Python starts it and hands it on; jobs and reports pass here, between the core's own parts.

use crate::detach::detached;
use crate::error::{self, Refused};
use crate::host_region::PyHostRegion;
use crate::kernels::Memory;
use crate::sampling::random_bytes;
use llmscale_kernels::disk_region::{DiskRegion, place_bytes};
use llmscale_kernels::disk_thread::{DiskThread, Job, Way};
use llmscale_kernels::host_region::HostRegion;
use llmscale_scheduler::Mirror;
use llmscale_types::{CopyDirection, DiskDirection, DiskReport, DiskTransfer, Epoch, HostBlockId};
use pyo3::prelude::*;
use std::path::Path;
use std::time::Duration;

/// A disk that does not finish one transfer in this time hangs, and a step that needs its place cannot be computed.
const MAX_WAIT: Duration = Duration::from_mins(1);

/// One rank's part of the disk tier.
#[pyclass(frozen, name = "DiskRegion", module = "llmscale._core")]
pub(crate) struct PyDiskRegion {
    thread: DiskThread,
    incarnation: u64,
}

#[pymethods]
impl PyDiskRegion {
    /// Opens or makes the file at `path`, for this process alone, and starts the thread. `host_path` is the file that a
    /// `HostRegion` of the same `block_bytes` and `layout` has mapped. What the file holds is kept if it is of this layout.
    #[new]
    fn new(
        path: &str,
        blocks: u32,
        host_path: &str,
        host_blocks: u32,
        block_bytes: usize,
        layout: u64,
    ) -> PyResult<Self> {
        let mut fresh = [0; 8];
        random_bytes(&mut fresh)?;
        let fresh = u64::from_le_bytes(fresh).max(1);
        PyHostRegion::bytes_for(host_blocks, block_bytes)?;
        let host = HostRegion::open(Path::new(host_path), host_blocks, block_bytes, layout, fresh);
        let host = host.map_err(|problem| error::worker(problem.to_string()))?;
        let disk = DiskRegion::open(Path::new(path), blocks, block_bytes, layout, fresh);
        let disk = disk.map_err(|problem| error::config(problem.to_string()))?;
        let incarnation = disk.incarnation();
        let thread = DiskThread::start(disk, host);
        let thread = thread.map_err(|problem| error::worker(format!("starting the disk's thread: {problem}")))?;
        Ok(Self { thread, incarnation })
    }

    /// Bytes that a block of so many bytes takes in the file.
    #[staticmethod]
    fn place_bytes(block_bytes: usize) -> PyResult<u64> {
        place_bytes(block_bytes).ok_or_else(|| error::config(format!("a block of {block_bytes} bytes fits no file")))
    }

    /// Another file has another number.
    #[getter]
    pub(crate) fn incarnation(&self) -> u64 {
        self.incarnation
    }

    /// What the system said when it first refused to read or write, once; `None` if it never did, or that was told.
    fn take_trouble(&self) -> Option<String> {
        self.thread.take_trouble()
    }

    /// Lets go of the file: another process can have it.
    fn close(&self, py: Python<'_>) {
        detached(py, || self.thread.close());
    }
}

impl PyDiskRegion {
    /// Makes the copies of a mirror's step after the transfers that they touch, and begins its own.
    pub(crate) fn copy_beside(
        &self,
        mirror: &Mirror,
        host: &PyHostRegion,
        kv: Memory,
    ) -> Result<(Vec<HostBlockId>, Duration), Refused> {
        self.settle(mirror)?;
        let (bad, took) = host.copy(mirror.copies(), kv)?;
        if bad.is_empty() {
            self.start(mirror)?;
        }
        Ok((bad, took))
    }

    /// Waits for transfers that the copies of a mirror's step touch.
    pub(crate) fn settle(&self, mirror: &Mirror) -> Result<(), Refused> {
        for copy in mirror.copies() {
            if !self.thread.settle(copy.host.0, copy.direction == CopyDirection::Offload, MAX_WAIT) {
                let limit = MAX_WAIT.as_secs();
                return Err(Refused(format!("the disk did not finish host block {} in {limit} s", copy.host)));
            }
        }
        Ok(())
    }

    /// Begins the transfers of a mirror's step, behind its copies.
    pub(crate) fn start(&self, mirror: &Mirror) -> Result<(), Refused> {
        let jobs: Vec<Job> = mirror.transfers().iter().map(job).collect();
        if self.thread.ask(&jobs) {
            return Ok(());
        }
        Err(Refused("a block is to be moved to or from the disk that does not exist".to_owned()))
    }

    /// What has become of transfers since the last call.
    pub(crate) fn report(&self, epoch: Epoch) -> Option<DiskReport> {
        let ended = self.thread.report()?;
        Some(DiskReport {
            epoch,
            through: ended.through,
            failed: ended.failed,
            refused: ended.refused,
            read_blocks: ended.read_blocks,
            read_ns: ended.read_ns,
            waits: ended.waits,
        })
    }

    /// Whether there is something to report, or will be.
    pub(crate) fn is_busy(&self) -> bool {
        self.thread.is_busy()
    }

    /// Waits until there is something to report.
    pub(crate) fn wait_for_news(&self, most: Duration) -> bool {
        self.thread.wait_for_news(most)
    }

    /// Another engine asks from now on.
    pub(crate) fn begin(&self) -> Result<(), Refused> {
        let idle = self.thread.begin(MAX_WAIT);
        idle.then_some(()).ok_or_else(|| Refused(format!("the disk is busy for {} s", MAX_WAIT.as_secs())))
    }
}

fn job(transfer: &DiskTransfer) -> Job {
    let &DiskTransfer { number, direction, host, disk, tag } = transfer;
    let way = if direction == DiskDirection::Write { Way::Write } else { Way::Read };
    Job { number, way, host: host.0, disk: disk.0, tag }
}
