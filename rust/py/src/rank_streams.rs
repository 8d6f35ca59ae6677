//! The door to streams among ranks of several hosts: the network's messages, and with the kernels' sums. Tensors come in as
//! (address, elements) of contiguous memory that the caller owns for the length of the call. Results have the bits that
//! ranks of one host get in shared memory. The GIL is released while ranks wait for each other.
#![expect(unsafe_code, reason = "tensors of torch are reached by address, sockets of Python by descriptor")]

use crate::detach::detached;
use crate::error;
use crate::kernels::{Dtype, Memory, view, view_mut};
use llmscale_kernels::element::{Bf16, Element};
use llmscale_kernels::rank_parts::{add_parts, place_columns};
use llmscale_net::{RankStreams, StreamError};
use pyo3::prelude::*;
use std::net::TcpStream;
use std::os::fd::{FromRawFd, RawFd};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Above this, three ranks and more add slices up and tell each other: 2 (n - 1) / n of the bytes instead of n - 1 times,
/// but two ways through the network instead of one.
const MAX_DIRECT_BYTES: usize = 64 << 10;

/// One rank's streams to the others of its stage. One exchange at a time.
#[pyclass(frozen, name = "RankStreams", module = "llmscale._core")]
pub(crate) struct PyRankStreams {
    inner: Mutex<Inner>,
    dtype: Dtype,
}

struct Inner {
    streams: RankStreams,
    /// What came from others, kept because a fresh megabyte costs 250 page faults.
    float32: Vec<f32>,
    bfloat16: Vec<Bf16>,
}

trait Arriving: Element + Plain {
    fn room(inner: &mut Inner) -> &mut Vec<Self>;
}

impl Arriving for f32 {
    fn room(inner: &mut Inner) -> &mut Vec<Self> {
        &mut inner.float32
    }
}

impl Arriving for Bf16 {
    fn room(inner: &mut Inner) -> &mut Vec<Self> {
        &mut inner.bfloat16
    }
}

fn stream_error(error: &StreamError) -> PyErr {
    error::worker(error.to_string())
}

#[pymethods]
impl PyRankStreams {
    /// Takes over the descriptors of connected TCP sockets, by rank and None for `rank` itself.
    #[new]
    #[pyo3(signature = (descriptors, rank, dtype = "float32", *, max_wait_us = 60_000_000))]
    fn new(descriptors: Vec<Option<RawFd>>, rank: usize, dtype: &str, max_wait_us: u64) -> PyResult<Self> {
        let dtype = Dtype::parse(dtype)?;
        if descriptors.iter().enumerate().any(|(other, descriptor)| descriptor.is_none() != (other == rank)) {
            return Err(error::worker(format!("rank {rank} needs a stream to every other rank and none to itself")));
        }
        // SAFETY: the caller has detached them from their socket objects, so nobody else closes them.
        let stream = |descriptor: RawFd| unsafe { TcpStream::from_raw_fd(descriptor) };
        let streams = descriptors.into_iter().map(|descriptor| descriptor.map(stream)).collect();
        let streams = RankStreams::new(rank, streams, Duration::from_micros(max_wait_us));
        let streams = streams.map_err(|error| stream_error(&error))?;
        Ok(Self { inner: Mutex::new(Inner { streams, float32: Vec::new(), bfloat16: Vec::new() }), dtype })
    }

    /// Replaces the values by their sum over all ranks: the same bits on every rank.
    fn sum(&self, py: Python<'_>, values: Memory) -> PyResult<()> {
        // SAFETY: the caller holds the tensor and nobody else touches it during the call.
        detached(py, || match self.dtype {
            Dtype::Float32 => self.lock().sum(unsafe { view_mut::<f32>(values) }),
            Dtype::Bfloat16 => self.lock().sum(unsafe { view_mut::<Bf16>(values) }),
        })
        .map_err(|error| stream_error(&error))
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
    }

    /// Fills int32 words that other ranks have: rank r has filled `bounds[r]..bounds[r + 1]`.
    fn gather_words(&self, py: Python<'_>, words: Memory, bounds: Vec<usize>) -> PyResult<()> {
        // SAFETY: the caller holds the tensor and nobody else touches it during the call.
        detached(py, || self.lock().gather_words(unsafe { view_mut::<u32>(words) }, &bounds))
    }

    /// Sends a message, (address, bytes), to the other one of two ranks; it may be overwritten afterwards. Waits only for
    /// room in the system's buffers.
    fn send(&self, py: Python<'_>, message: Memory) -> PyResult<()> {
        // SAFETY: the caller holds the tensor and nobody writes it during the call.
        detached(py, || self.lock().one_way(unsafe { view::<u8>(message) }, &mut []))
    }

    /// Waits for a message of exactly this length, (address, bytes), from the other one of two ranks.
    fn receive(&self, py: Python<'_>, message: Memory) -> PyResult<()> {
        // SAFETY: the caller holds the tensor and nobody else touches it during the call.
        detached(py, || self.lock().one_way(&[], unsafe { view_mut::<u8>(message) }))
    }
}

impl PyRankStreams {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run_deal<T: Arriving>(&self, own: Memory, widths: &[usize], bounds: &[usize], out: Memory) -> PyResult<()> {
        // SAFETY: the caller holds both tensors, which do not overlap, and nobody writes them during the call.
        let (own, out) = unsafe { (view::<T>(own), view_mut::<T>(out)) };
        self.lock().deal_rows(own, widths, bounds, out)
    }
}

impl Inner {
    fn sum<T: Arriving>(&mut self, values: &mut [T]) -> Result<(), StreamError> {
        let ranks = self.streams.ranks();
        if ranks == 2 || size_of_val(values) <= MAX_DIRECT_BYTES {
            return self.add(&vec![0..values.len(); ranks], values);
        }
        let slices: Vec<_> =
            (0..ranks).map(|rank| values.len() * rank / ranks..values.len() * (rank + 1) / ranks).collect();
        self.add(&slices, values)?;
        let own = values[slices[self.streams.rank()].clone()].to_vec();
        let outgoing = vec![bytes(&own); ranks];
        self.streams.exchange(&outgoing, &mut split(values, slices.iter().map(ExactSizeIterator::len)))
    }

    /// Sends each rank its slice of the values, and adds up what all of them have of this rank's own.
    fn add<T: Arriving>(&mut self, slices: &[std::ops::Range<usize>], values: &mut [T]) -> Result<(), StreamError> {
        let (ranks, rank) = (slices.len(), self.streams.rank());
        let own = slices[rank].clone();
        let outgoing: Vec<&[u8]> = slices.iter().map(|slice| bytes(&values[slice.clone()])).collect();
        let mut arriving = std::mem::take(T::room(self));
        arriving.resize(arriving.len().max(ranks * own.len()), T::from_f32(0.0));
        let parts = &mut arriving[..ranks * own.len()];
        let outcome = self.streams.exchange(&outgoing, &mut split(parts, (0..ranks).map(|_| own.len())));
        if outcome.is_ok() && !own.is_empty() {
            parts[rank * own.len()..][..own.len()].copy_from_slice(&values[own.clone()]);
            let parts: Vec<&[T]> = parts.chunks(own.len()).collect();
            add_parts(&parts, &mut values[own]);
        }
        *T::room(self) = arriving;
        outcome
    }

    fn deal_rows<T: Arriving>(&mut self, own: &[T], widths: &[usize], bounds: &[usize], out: &mut [T]) -> PyResult<()> {
        let rank = self.streams.rank();
        let rows = self.require_bounds(bounds)?;
        let dealt = bounds[rank + 1] - bounds[rank];
        let total: usize = widths.iter().sum();
        let fit = widths.len() == self.streams.ranks() && own.len() == rows * widths[rank];
        if !fit || out.len() != dealt * total {
            let (own, out) = (own.len(), out.len());
            return Err(error::worker(format!(
                "{own} values of widths {widths:?} are not dealt to {out} by {bounds:?}"
            )));
        }
        let of_rank = |rank: usize, width: usize| bounds[rank] * width..bounds[rank + 1] * width;
        let outgoing: Vec<&[u8]> = (0..widths.len()).map(|to| bytes(&own[of_rank(to, widths[rank])])).collect();
        let mut arriving = std::mem::take(T::room(self));
        arriving.resize(arriving.len().max(out.len()), T::from_f32(0.0));
        let mut parts = split(&mut arriving[..out.len()], widths.iter().map(|width| dealt * width));
        let outcome = self.streams.exchange(&outgoing, &mut parts);
        let mut at = 0;
        for (from, width) in widths.iter().enumerate() {
            let part = if from == rank { &own[of_rank(rank, *width)] } else { &arriving[at..at + dealt * width] };
            place_columns(part, 0, *width, out, total, widths[..from].iter().sum());
            at += dealt * width;
        }
        *T::room(self) = arriving;
        outcome.map_err(|error| stream_error(&error))
    }

    fn gather_words(&mut self, words: &mut [u32], bounds: &[usize]) -> PyResult<()> {
        if self.require_bounds(bounds)? != words.len() {
            return Err(error::worker(format!("{} words are not divided by {bounds:?}", words.len())));
        }
        let rank = self.streams.rank();
        let own = words[bounds[rank]..bounds[rank + 1]].to_vec();
        let outgoing = vec![bytes(&own); self.streams.ranks()];
        let mut parts = split(words, bounds.windows(2).map(|pair| pair[1] - pair[0]));
        self.streams.exchange(&outgoing, &mut parts).map_err(|error| stream_error(&error))
    }

    fn one_way(&mut self, outgoing: &[u8], incoming: &mut [u8]) -> PyResult<()> {
        if self.streams.ranks() != 2 {
            let ranks = self.streams.ranks();
            return Err(error::worker(format!("a message goes one way between two ranks, there are {ranks}")));
        }
        let outcome = if self.streams.rank() == 0 {
            self.streams.exchange(&[&[], outgoing], &mut [&mut [], incoming])
        } else {
            self.streams.exchange(&[outgoing, &[]], &mut [incoming, &mut []])
        };
        outcome.map_err(|error| stream_error(&error))
    }

    /// What bounds divide among the ranks.
    fn require_bounds(&self, bounds: &[usize]) -> PyResult<usize> {
        let ranks = self.streams.ranks();
        if bounds.len() == ranks + 1 && bounds[0] == 0 && bounds.is_sorted() {
            return Ok(bounds[ranks]);
        }
        Err(error::worker(format!(
            "{bounds:?} are no bounds for {ranks} ranks: from 0 on, ascending, one more than ranks"
        )))
    }
}

/// Numbers that are nothing but their bits.
trait Plain: Copy {}
impl Plain for u32 {}
impl Plain for f32 {}
impl Plain for Bf16 {}

fn bytes<T: Plain>(values: &[T]) -> &[u8] {
    // SAFETY: plain numbers have neither padding nor invalid bits.
    unsafe { std::slice::from_raw_parts(values.as_ptr().cast(), size_of_val(values)) }
}

/// Consecutive parts, as bytes that may be written.
fn split<T: Plain>(mut values: &mut [T], lengths: impl Iterator<Item = usize>) -> Vec<&mut [u8]> {
    let part = |length: usize| {
        let (part, rest) = std::mem::take(&mut values).split_at_mut(length);
        values = rest;
        // SAFETY: as in `bytes`; the parts do not overlap.
        unsafe { std::slice::from_raw_parts_mut(part.as_mut_ptr().cast(), size_of_val(part)) }
    };
    lengths.map(part).collect()
}
