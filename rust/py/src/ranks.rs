//! The door to the memory that ranks of one host share. Tensors come in as (address, elements) of contiguous memory that
//! the caller owns for the length of the call. The GIL is released while ranks wait for each other.
#![expect(unsafe_code, reason = "tensors of torch are reached by address")]

use crate::detach::detached;
use crate::error;
use crate::kernels::{Dtype, Memory, view, view_mut};
use llmscale_kernels::element::{Bf16, Element};
use llmscale_kernels::rank_channel::RankChannel;
use llmscale_kernels::rank_memory::{RankError, RankMemory};
use pyo3::prelude::*;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// One rank's end of the memory that the ranks of one host share. One exchange at a time.
#[pyclass(frozen, name = "RankMemory", module = "llmscale._core")]
pub(crate) struct PyRankMemory {
    inner: Mutex<RankMemory>,
    dtype: Dtype,
}

fn rank_error(error: &RankError) -> PyErr {
    error::worker(error.to_string())
}

#[pymethods]
impl PyRankMemory {
    /// Maps `path`, a file of `bytes_for(ranks, room_bytes)` zeros that every rank opens.
    #[new]
    #[pyo3(signature = (path, rank, ranks, room_bytes, dtype, *, max_wait_us = 60_000_000))]
    fn new(path: &str, rank: usize, ranks: usize, room_bytes: usize, dtype: &str, max_wait_us: u64) -> PyResult<Self> {
        let wait = Duration::from_micros(max_wait_us);
        let memory = RankMemory::open(Path::new(path), rank, ranks, room_bytes, wait);
        Ok(Self { inner: Mutex::new(memory.map_err(|error| rank_error(&error))?), dtype: Dtype::parse(dtype)? })
    }

    /// Size of the file.
    #[staticmethod]
    fn bytes_for(ranks: usize, room_bytes: usize) -> usize {
        RankMemory::bytes_for(ranks, room_bytes)
    }

    /// Replaces the values by their sum over all ranks: the same bits on every rank.
    fn sum(&self, py: Python<'_>, values: Memory) -> PyResult<()> {
        detached(py, || match self.dtype {
            Dtype::Float32 => self.run_sum::<f32>(values),
            Dtype::Bfloat16 => self.run_sum::<Bf16>(values),
        })
        .map_err(|error| rank_error(&error))
    }

    /// This rank gets `[bounds[rank]..bounds[rank + 1], sum of widths]`, from `[bounds[-1], widths[rank]]` of each.
    fn deal_rows(
        &self,
        py: Python<'_>,
        own: Memory,
        widths: Vec<usize>,
        bounds: Vec<usize>,
        out: Memory,
    ) -> PyResult<()> {
        detached(py, || match self.dtype {
            Dtype::Float32 => self.run_deal::<f32>(own, &widths, &bounds, out),
            Dtype::Bfloat16 => self.run_deal::<Bf16>(own, &widths, &bounds, out),
        })
        .map_err(|error| rank_error(&error))
    }

    /// Fills int32 words that other ranks have: rank r has filled `bounds[r]..bounds[r + 1]`.
    fn gather_words(&self, py: Python<'_>, words: Memory, bounds: Vec<usize>) -> PyResult<()> {
        // SAFETY: the caller holds the tensor and nobody else touches it during the call.
        detached(py, || self.lock().gather_words(unsafe { view_mut::<u32>(words) }, &bounds))
            .map_err(|error| rank_error(&error))
    }

    /// Returns when every rank has come as far.
    fn meet(&self, py: Python<'_>) -> PyResult<()> {
        detached(py, || self.lock().meet()).map_err(|error| rank_error(&error))
    }
}

impl PyRankMemory {
    fn lock(&self) -> MutexGuard<'_, RankMemory> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run_sum<T: Element>(&self, values: Memory) -> Result<(), RankError> {
        // SAFETY: the caller holds the tensor and nobody else touches it during the call.
        self.lock().sum(unsafe { view_mut::<T>(values) })
    }

    fn run_deal<T: Element>(
        &self,
        own: Memory,
        widths: &[usize],
        bounds: &[usize],
        out: Memory,
    ) -> Result<(), RankError> {
        // SAFETY: the caller holds both tensors, which do not overlap, and nobody writes them during the call.
        let (own, out) = unsafe { (view::<T>(own), view_mut::<T>(out)) };
        self.lock().deal_rows(own, widths, bounds, out)
    }
}

/// One end of a one-way channel between two ranks of one host, for the sender or for the receiver.
#[pyclass(frozen, name = "RankChannel", module = "llmscale._core")]
pub(crate) struct PyRankChannel {
    inner: Mutex<RankChannel>,
}

#[pymethods]
impl PyRankChannel {
    /// Maps `path`, a file of `BYTES` zeros that both ranks open; `peer` is the rank at the other end.
    #[new]
    #[pyo3(signature = (path, peer, *, max_wait_us = 60_000_000))]
    fn new(path: &str, peer: usize, max_wait_us: u64) -> PyResult<Self> {
        let channel = RankChannel::open(Path::new(path), peer, Duration::from_micros(max_wait_us));
        Ok(Self { inner: Mutex::new(channel.map_err(|error| rank_error(&error))?) })
    }

    /// Size of the file.
    #[classattr]
    const BYTES: usize = RankChannel::BYTES;

    /// Sends a message, (address, bytes), which may be overwritten afterwards. Waits only while the channel is full.
    fn send(&self, py: Python<'_>, message: Memory) -> PyResult<()> {
        // SAFETY: the caller holds the tensor and nobody writes it during the call.
        detached(py, || self.lock().send(unsafe { view::<u8>(message) })).map_err(|error| rank_error(&error))
    }

    /// Waits for a message of exactly this length, (address, bytes).
    fn receive(&self, py: Python<'_>, message: Memory) -> PyResult<()> {
        // SAFETY: the caller holds the tensor and nobody else touches it during the call.
        detached(py, || self.lock().receive(unsafe { view_mut::<u8>(message) })).map_err(|error| rank_error(&error))
    }
}

impl PyRankChannel {
    fn lock(&self) -> MutexGuard<'_, RankChannel> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
