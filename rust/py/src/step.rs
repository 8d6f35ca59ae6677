//! What a worker's Python sees of a step: how much of each buffer it uses, and the buffers by name.

use crate::buffer::Int32Buffer;
use crate::error;
use llmscale_scheduler::{Mirror, StepCounts};
use pyo3::prelude::*;

/// How much of the buffers the current step uses.
#[pyclass(frozen, get_all, name = "StepCounts", module = "llmscale._core")]
pub(crate) struct PyStepCounts {
    /// Token rows.
    pub(crate) rows: u32,
    /// Sequences with rows; those in decode come first.
    pub(crate) sequences: u32,
    /// Sequences in decode, one row each.
    pub(crate) decodes: u32,
    /// Rows that sample.
    pub(crate) samples: u32,
    /// Blocks to copy between tiers before the rows are computed.
    pub(crate) copies: u32,
    /// Blocks to move between the host tier and the disk.
    pub(crate) transfers: u32,
}

impl From<StepCounts> for PyStepCounts {
    fn from(counts: StepCounts) -> Self {
        let StepCounts { rows, sequences, decodes, samples, copies, transfers } = counts;
        Self { rows, sequences, decodes, samples, copies, transfers }
    }
}

impl From<&PyStepCounts> for StepCounts {
    fn from(counts: &PyStepCounts) -> Self {
        let &PyStepCounts { rows, sequences, decodes, samples, copies, transfers } = counts;
        Self { rows, sequences, decodes, samples, copies, transfers }
    }
}

/// One buffer of a mirror, kept alive by `owner`.
pub(crate) fn buffer(mirror: &Mirror, owner: Py<PyAny>, name: &str) -> PyResult<Int32Buffer> {
    let buffers = mirror.buffers();
    let memory = match name {
        "token_ids" => &buffers.token_ids,
        "positions" => &buffers.positions,
        "slot_mapping" => &buffers.slot_mapping,
        "query_start" => &buffers.query_start,
        "sequence_lengths" => &buffers.sequence_lengths,
        "table_offsets" => &buffers.table_offsets,
        "block_tables" => &buffers.block_tables,
        "sample_rows" => &buffers.sample_rows,
        other => return Err(error::config(format!("there is no step buffer {other:?}"))),
    };
    Ok(Int32Buffer::new(owner, memory))
}
