//! The door for an engine's sizes: keyword arguments in, checked together, one frozen object out.

use crate::error;
use llmscale_types::EngineLimits;
use pyo3::prelude::*;

/// Sizes and bounds of one replica. Raises `InvalidField` if they do not fit together.
#[pyclass(frozen, name = "EngineLimits", module = "llmscale._core")]
pub(crate) struct PyEngineLimits(pub(crate) EngineLimits);

#[pymethods]
impl PyEngineLimits {
    #[new]
    #[pyo3(signature = (*, vocabulary, total_blocks, max_sequence_tokens, eos_tokens, block_tokens = 32,
        max_sequences = 256, max_step_tokens = 512, max_waiting_sequences = 1024, max_steps_in_flight = 2,
        groups = 1, host_blocks = 0, disk_blocks = 0))]
    #[expect(clippy::too_many_arguments, reason = "keyword arguments, named by the caller")]
    fn new(
        vocabulary: u32,
        total_blocks: u32,
        max_sequence_tokens: u32,
        eos_tokens: Vec<u32>,
        block_tokens: u32,
        max_sequences: u32,
        max_step_tokens: u32,
        max_waiting_sequences: u32,
        max_steps_in_flight: u32,
        groups: u32,
        host_blocks: u32,
        disk_blocks: u32,
    ) -> PyResult<Self> {
        let limits = EngineLimits {
            block_tokens,
            total_blocks,
            host_blocks,
            disk_blocks,
            max_sequences,
            max_step_tokens,
            max_sequence_tokens,
            max_waiting_sequences,
            max_steps_in_flight,
            groups,
            eos_tokens,
            vocabulary,
        };
        limits.check().map_err(|error| error::limit(&error))?;
        Ok(Self(limits))
    }

    /// The same with another number of KV blocks.
    fn with_total_blocks(&self, total_blocks: u32) -> PyResult<Self> {
        let limits = EngineLimits { total_blocks, ..self.0.clone() };
        limits.check().map_err(|error| error::limit(&error))?;
        Ok(Self(limits))
    }

    /// Most blocks of a host tier.
    #[classattr]
    const MAX_HOST_BLOCKS: u32 = EngineLimits::MAX_HOST_BLOCKS;

    /// Most blocks of a disk tier.
    #[classattr]
    const MAX_DISK_BLOCKS: u32 = EngineLimits::MAX_DISK_BLOCKS;

    #[getter]
    fn vocabulary(&self) -> u32 {
        self.0.vocabulary
    }

    #[getter]
    fn total_blocks(&self) -> u32 {
        self.0.total_blocks
    }

    #[getter]
    fn host_blocks(&self) -> u32 {
        self.0.host_blocks
    }

    #[getter]
    fn disk_blocks(&self) -> u32 {
        self.0.disk_blocks
    }

    #[getter]
    fn block_tokens(&self) -> u32 {
        self.0.block_tokens
    }

    #[getter]
    fn max_sequences(&self) -> u32 {
        self.0.max_sequences
    }

    #[getter]
    fn max_step_tokens(&self) -> u32 {
        self.0.max_step_tokens
    }

    #[getter]
    fn max_sequence_tokens(&self) -> u32 {
        self.0.max_sequence_tokens
    }

    fn __repr__(&self) -> String {
        format!("{:?}", self.0)
    }
}
