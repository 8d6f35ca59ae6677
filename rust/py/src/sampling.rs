//! The door for sampling parameters: keyword arguments in, checked ranges, one frozen object out.

use crate::error;
use llmscale_types::Sampling;
use pyo3::prelude::*;

/// How the next token is chosen and when a sequence ends. Immutable; bounds are those of the core.
#[pyclass(frozen, name = "Sampling", module = "llmscale._core")]
pub(crate) struct PySampling(pub(crate) Sampling);

#[pymethods]
impl PySampling {
    #[new]
    #[pyo3(signature = (*, temperature = 1.0, top_k = 0, top_p = 1.0, min_p = 0.0, repetition_penalty = 1.0,
        presence_penalty = 0.0, frequency_penalty = 0.0, seed = None, choice = 0, logprobs = None,
        logit_bias = Vec::new(), max_tokens = 16, min_tokens = 0, stop_tokens = Vec::new(), ignore_eos = false))]
    #[expect(clippy::too_many_arguments, reason = "keyword arguments, named by the caller")]
    fn new(
        temperature: f32,
        top_k: u32,
        top_p: f32,
        min_p: f32,
        repetition_penalty: f32,
        presence_penalty: f32,
        frequency_penalty: f32,
        seed: Option<u64>,
        choice: u32,
        logprobs: Option<u32>,
        logit_bias: Vec<(u32, f32)>,
        max_tokens: u32,
        min_tokens: u32,
        stop_tokens: Vec<u32>,
        ignore_eos: bool,
    ) -> PyResult<Self> {
        let sampling = Sampling {
            temperature,
            top_k,
            top_p,
            min_p,
            repetition_penalty,
            presence_penalty,
            frequency_penalty,
            seed: seed.map_or_else(random_seed, Ok)?,
            choice,
            logprobs,
            logit_bias,
            max_tokens,
            min_tokens,
            stop_tokens,
            ignore_eos,
        };
        // Ids are checked against the model's vocabulary when the request is submitted.
        sampling.check(u32::MAX).map_err(|error| error::limit(&error))?;
        Ok(Self(sampling))
    }

    /// Key of the counter-based generator, drawn from the operating system where none was given.
    #[getter]
    fn seed(&self) -> u64 {
        self.0.seed
    }

    /// Most output tokens.
    #[getter]
    fn max_tokens(&self) -> u32 {
        self.0.max_tokens
    }

    fn __repr__(&self) -> String {
        format!("{:?}", self.0)
    }
}

/// A seed from the operating system.
pub(crate) fn random_seed() -> PyResult<u64> {
    let mut bytes = [0; 8];
    random_bytes(&mut bytes)?;
    Ok(u64::from_le_bytes(bytes))
}

/// Bytes from the operating system's generator.
pub(crate) fn random_bytes(bytes: &mut [u8]) -> PyResult<()> {
    use std::io::Read;
    std::fs::File::open("/dev/urandom")?.read_exact(bytes)?;
    Ok(())
}
