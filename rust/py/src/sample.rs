//! From logits to a step's result: rows of the sampler from the mirror's state, tokens back into the mirror. Which rows
//! sample and with what is the mirror's; how a token is drawn is the sampler's; this file only joins them.
#![expect(unsafe_code, reason = "logits of torch are reached by address")]

use crate::error;
use crate::kernels::{CpuKernels, Dtype, Memory, view, view_mut};
use llmscale_kernels::element::{Bf16, Element};
use llmscale_kernels::sampler::{self, Logits, RowLogprobs, SamplerRow};
use llmscale_scheduler::Mirror;
use llmscale_types::{RowError, Slot, StepResult, Token, TokenLogprobs};
use pyo3::PyResult;

/// Draws a token for every sampling row of the mirror's step and records it there; also returns them by row. `logits` are
/// `[samples, vocabulary]` in the rows' order.
pub(crate) fn sample_step(
    kernels: &CpuKernels,
    mirror: &mut Mirror,
    logits: Memory,
    dtype: Dtype,
) -> PyResult<(StepResult, Vec<Option<Token>>)> {
    let slots: Vec<Slot> = mirror.sample_slots().to_vec();
    let suppressed: Vec<Vec<Token>> =
        slots.iter().enumerate().map(|(row, &slot)| mirror.suppressed(row, slot)).collect();
    let rows: Vec<SamplerRow<'_>> = slots
        .iter()
        .zip(&suppressed)
        .enumerate()
        .map(|(sample, (&slot, suppressed))| sampler_row(mirror, sample, slot, suppressed))
        .collect();
    let sampled = match dtype {
        Dtype::Float32 => run::<f32>(kernels, mirror.vocabulary(), logits, &rows),
        Dtype::Bfloat16 => run::<Bf16>(kernels, mirror.vocabulary(), logits, &rows),
    }
    .map_err(|error| error::kernel(&error))?;
    drop(rows);
    let (epoch, step) = mirror.step();
    let mut result = StepResult {
        epoch,
        step,
        slots: Vec::with_capacity(slots.len()),
        tokens: Vec::with_capacity(slots.len()),
        logprobs: Vec::new(),
        errors: Vec::new(),
        elapsed_ns: 0,
        waited_ns: 0,
    };
    let tokens: Vec<Option<Token>> = sampled.iter().map(|row| row.token.ok()).collect();
    mirror.record(&tokens);
    for (slot, row) in slots.into_iter().zip(sampled) {
        match row.token {
            Ok(token) => {
                result.slots.push(slot);
                result.tokens.push(token);
                result.logprobs.extend(row.logprobs.map(|logprobs| (slot, token_logprobs(logprobs))));
            }
            Err(error) => result.errors.push((slot, row_error(error))),
        }
    }
    Ok((result, tokens))
}

/// Ids as int32 for other ranks, -1 where a row failed.
pub(crate) fn write_tokens(sampled: &[Option<Token>], memory: Memory) -> PyResult<()> {
    if memory.1 < sampled.len() {
        return Err(error::worker(format!("{} ids were sampled, the buffer takes {}", sampled.len(), memory.1)));
    }
    // SAFETY: the caller holds a contiguous int32 tensor that nobody else touches during the call.
    let out = unsafe { view_mut::<i32>(memory) };
    for (out, token) in out.iter_mut().zip(sampled) {
        *out = token.map_or(-1, |token| token as i32);
    }
    Ok(())
}

/// The reverse of [`write_tokens`].
pub(crate) fn read_tokens(memory: Memory, samples: usize) -> PyResult<Vec<Option<Token>>> {
    if memory.1 < samples {
        return Err(error::worker(format!("{samples} rows sample, the buffer has {} ids", memory.1)));
    }
    // SAFETY: the caller holds a contiguous int32 tensor that nobody writes during the call.
    let ids = unsafe { view::<i32>(memory) };
    Ok(ids[..samples].iter().map(|&id| Token::try_from(id).ok()).collect())
}

fn run<T: Element>(
    kernels: &CpuKernels,
    vocabulary: usize,
    logits: Memory,
    rows: &[SamplerRow<'_>],
) -> Result<Vec<sampler::SampledRow>, llmscale_kernels::error::KernelError> {
    // SAFETY: the executor's logits are a contiguous tensor of this dtype, held and not written during the call.
    let values = unsafe { view::<T>(logits) };
    sampler::sample(&kernels.pool, kernels.level, &Logits { values, vocabulary, row_stride: vocabulary }, rows)
}

fn sampler_row<'a>(mirror: &'a Mirror, sample: usize, slot: Slot, suppressed: &'a [Token]) -> SamplerRow<'a> {
    let state = mirror.sampling(slot);
    let sampling = &state.sampling;
    SamplerRow {
        temperature: sampling.temperature,
        top_k: sampling.top_k,
        top_p: sampling.top_p,
        min_p: sampling.min_p,
        repetition_penalty: sampling.repetition_penalty,
        presence_penalty: sampling.presence_penalty,
        frequency_penalty: sampling.frequency_penalty,
        seed: sampling.seed,
        choice: sampling.choice,
        position: mirror.sample_position(sample),
        logprobs: sampling.logprobs,
        suppressed,
        logit_bias: &sampling.logit_bias,
        allowed: None,
        prompt_tokens: &state.prompt_set,
        generated_counts: &state.emitted_counts,
    }
}

fn token_logprobs(row: RowLogprobs) -> TokenLogprobs {
    TokenLogprobs { chosen: row.chosen, top: row.top }
}

fn row_error(error: sampler::RowError) -> RowError {
    match error {
        sampler::RowError::NotFinite { .. } => RowError::NotANumber,
        sampler::RowError::NoCandidate => RowError::NothingToSample,
    }
}
