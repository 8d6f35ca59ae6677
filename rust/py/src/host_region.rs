//! The door to the host tier's memory: one rank's blocks in a file that the node owns, and the copies of a step between
//! them and the KV region. A region comes in as (address, bytes) of contiguous memory that the caller owns for the length
//! of the call.
#![expect(unsafe_code, reason = "the KV region is reached by address")]

use crate::detach::detached;
use crate::error::{self, Refused};
use crate::kernels::{Memory, view_mut};
use crate::sampling::random_bytes;
use llmscale_kernels::host_region::HostRegion;
use llmscale_kernels::touch_ahead::TouchAhead;
use llmscale_types::{BlockCopy, CopyDirection, HostBlockId};
use pyo3::prelude::*;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// One rank's part of the host tier.
#[pyclass(frozen, name = "HostRegion", module = "llmscale._core")]
pub(crate) struct PyHostRegion {
    inner: Mutex<HostRegion>,
    touch: TouchAhead,
}

#[pymethods]
impl PyHostRegion {
    /// Maps `path`, a file of `bytes_for(blocks, block_bytes)` bytes. What it holds is kept if it is of this `layout`.
    #[new]
    fn new(path: &str, blocks: u32, block_bytes: usize, layout: u64) -> PyResult<Self> {
        let mut fresh = [0; 8];
        random_bytes(&mut fresh)?;
        let fresh = u64::from_le_bytes(fresh).max(1);
        Self::bytes_for(blocks, block_bytes)?;
        let region = HostRegion::open(Path::new(path), blocks, block_bytes, layout, fresh);
        let region = region.map_err(|problem| error::worker(problem.to_string()))?;
        let touch = region.touch_ahead();
        let touch = touch.map_err(|problem| error::worker(format!("starting a thread: {problem}")))?;
        Ok(Self { inner: Mutex::new(region), touch })
    }

    /// Size of the file.
    #[staticmethod]
    pub(crate) fn bytes_for(blocks: u32, block_bytes: usize) -> PyResult<usize> {
        let too_many = || error::config(format!("{blocks} blocks of {block_bytes} bytes have no room in memory"));
        HostRegion::bytes_for(blocks, block_bytes).ok_or_else(too_many)
    }

    /// Another memory has another number.
    #[getter]
    fn incarnation(&self) -> u64 {
        self.lock().incarnation()
    }

    /// (address, bytes) of all of it, for a device to register.
    fn memory(&self) -> Memory {
        self.lock().memory()
    }

    /// Address of a block.
    fn address(&self, host: u32) -> PyResult<usize> {
        self.known(host)?;
        Ok(self.lock().address(host))
    }

    /// A device is about to copy to this block.
    fn clear(&self, host: u32) -> PyResult<()> {
        self.known(host)?;
        self.lock().clear(host);
        Ok(())
    }

    /// A device has copied what `tag` stands for to this block: hashes it, so that a later copy back can be checked.
    fn seal(&self, py: Python<'_>, host: u32, tag: u64) -> PyResult<()> {
        self.known(host)?;
        detached(py, || self.lock().seal(host, tag));
        Ok(())
    }

    /// Whether a block holds what was sealed under `tag`.
    fn agrees(&self, py: Python<'_>, host: u32, tag: u64) -> PyResult<bool> {
        self.known(host)?;
        Ok(detached(py, || self.lock().agrees(host, tag)))
    }
}

impl PyHostRegion {
    fn lock(&self) -> MutexGuard<'_, HostRegion> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn known(&self, host: u32) -> PyResult<()> {
        let has = self.lock().blocks();
        if host < has { Ok(()) } else { Err(error::worker(format!("host block {host} of {has} does not exist"))) }
    }

    /// Makes copies in order, and says how long they took. Returns the host blocks that do not hold what they should.
    pub(crate) fn copy(&self, copies: &[BlockCopy], kv: Memory) -> Result<(Vec<HostBlockId>, Duration), Refused> {
        let mut region = self.lock();
        let started = Instant::now();
        // SAFETY: the caller holds the contiguous KV region, which nobody else touches during the call.
        let kv = unsafe { view_mut::<u8>(kv) };
        let block_bytes = region.block_bytes();
        let mut bad = Vec::new();
        for copy in copies {
            let start = copy.block.index() * block_bytes;
            let has = region.blocks();
            let Some(block) = kv.get_mut(start..start + block_bytes).filter(|_| copy.host.0 < has) else {
                let (block, host, bytes) = (copy.block, copy.host, kv.len());
                let problem = format!("block {block} of {bytes} bytes and host block {host} of {has} are to be copied");
                return Err(Refused(problem));
            };
            match copy.direction {
                CopyDirection::Offload => {
                    region.offload(copy.host.0, copy.tag, block);
                    self.touch.reached(copy.host.0);
                }
                CopyDirection::Restore => {
                    if !region.restore(copy.host.0, copy.tag, block) {
                        bad.push(copy.host);
                    }
                }
            }
        }
        Ok((bad, started.elapsed()))
    }
}
