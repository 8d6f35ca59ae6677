//! The door for devices that compute apart from the processor: a step packed for one transfer, what a sampler there has
//! drawn, and the copies between tiers as a list. Memory comes in as (address, elements) of contiguous int32 that the
//! caller owns for the length of the call. Works on a mirror; whose it is, the session and the local replica say.
#![expect(unsafe_code, reason = "memory of torch is reached by address")]

use crate::disk_region::PyDiskRegion;
use crate::error::Refused;
use crate::kernels::{Memory, view, view_mut};
use llmscale_engine::columns::{Changes, drawn_entries, read_drawn};
use llmscale_engine::drawn::{self, SampledStep};
use llmscale_engine::packed::{NoRoom, PARTS, Room, offsets, pack};
use llmscale_scheduler::Mirror;
use llmscale_types::CopyDirection;
use pyo3::prelude::*;
use std::ops::Range;

/// What was packed of a step.
#[pyclass(frozen, get_all, name = "PackedStep", module = "llmscale._core")]
pub(crate) struct PyPackedStep {
    /// int32 entries that were written.
    entries: usize,
    /// The first of the step's sampling rows that were packed.
    first_sample: usize,
    /// One past the last.
    last_sample: usize,
    /// Logits that change before sampling; None if the columns do not say how to sample these rows.
    changes: Option<usize>,
    /// Whether a row wants log probabilities.
    wants_logprobs: bool,
}

#[pymethods]
impl PyPackedStep {
    /// Where each part of a packed step begins, in entries, and last the block tables: see `llmscale_engine::packed`.
    #[staticmethod]
    fn offsets(rows: usize, sequences: usize) -> [usize; PARTS + 1] {
        offsets(Room { rows, sequences })
    }

    /// int32 entries that a sampler for so many rows leaves.
    #[staticmethod]
    fn drawn_entries(max_rows: usize) -> usize {
        drawn_entries(max_rows)
    }
}

/// A block to copy between tiers: whether it comes back from the host, the device's block, the host's, what they hold.
pub(crate) type Copy = (bool, u32, u32, u64);

/// What the mirror's step copies.
pub(crate) fn copies(mirror: &Mirror, disk: Option<&PyDiskRegion>) -> Result<Vec<Copy>, Refused> {
    disk.map_or(Ok(()), |disk| disk.settle(mirror))?;
    let copy = |copy: &llmscale_types::BlockCopy| {
        (copy.direction == CopyDirection::Restore, copy.block.0, copy.host.0, copy.tag)
    };
    Ok(mirror.copies().iter().map(copy).collect())
}

/// Packs rows of the mirror's step.
pub(crate) fn pack_rows(
    mirror: &Mirror,
    rows: (usize, usize),
    room: (usize, usize),
    out: Memory,
    changes: Memory,
) -> Result<PyPackedStep, Refused> {
    let ((first, last), (room_rows, sequences)) = (rows, room);
    // SAFETY: the caller holds contiguous int32 tensors that nobody else touches during the call.
    let (out, changes) = unsafe { (view_mut::<i32>(out), view_mut::<i32>(changes)) };
    let room = Room { rows: room_rows, sequences };
    let packed = pack(mirror, first..last, room, out, &mut Changes::of(changes)).map_err(no_room)?;
    Ok(PyPackedStep {
        entries: packed.entries,
        first_sample: packed.samples.start,
        last_sample: packed.samples.end,
        changes: packed.changes,
        wants_logprobs: packed.wants_logprobs,
    })
}

/// Fills the words of sampling rows of a step from what a device's sampler for `max_rows` rows has left.
pub(crate) fn take_drawn(
    step: &SampledStep,
    samples: Range<usize>,
    sampled: Memory,
    max_rows: usize,
    words: Memory,
) -> Result<(), Refused> {
    // SAFETY: the caller holds contiguous int32 tensors that nobody else touches during the call.
    let (sampled, words) = unsafe { (view::<i32>(sampled), view_mut::<u32>(words)) };
    let bounds = bounds_of(step, &samples, words.len())?;
    for (row, sample) in samples.enumerate() {
        let drawn = read_drawn(sampled, max_rows, row, step.asked()[sample]).map_err(no_room)?;
        drawn::write_row(&drawn, &mut words[bounds[sample]..bounds[sample + 1]]);
    }
    Ok(())
}

/// Where the words of every sampling row begin.
fn bounds_of(step: &SampledStep, samples: &Range<usize>, words: usize) -> Result<Vec<usize>, Refused> {
    let bounds = step.word_bounds();
    if samples.end >= bounds.len() || bounds[bounds.len() - 1] > words {
        let (rows, needed) = (bounds.len() - 1, bounds[bounds.len() - 1]);
        let asked = format!("rows {} to {} of {rows}", samples.start, samples.end);
        return Err(Refused(format!("{asked} are drawn into {words} words of {needed}")));
    }
    Ok(bounds)
}

fn no_room(problem: NoRoom) -> Refused {
    Refused::of(&problem)
}
