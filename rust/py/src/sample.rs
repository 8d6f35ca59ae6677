//! From logits to drawn rows: parameters of the sampler from the mirror's state, its outcome in the plan's words. Which
//! rows sample and with what is the mirror's; how a token is drawn is the sampler's; this file only joins them.
#![expect(unsafe_code, reason = "logits of torch are reached by address")]

use crate::error::Refused;
use crate::kernels::{CpuKernels, Dtype, Memory, view, view_mut};
use llmscale_engine::drawn::{self, DrawnRow, SampledStep};
use llmscale_kernels::element::{Bf16, Element};
use llmscale_kernels::sampler::{self, Logits, RowLogprobs, SampledRow, SamplerRow};
use llmscale_scheduler::Mirror;
use llmscale_types::{RowError, Slot, Token, TokenLogprobs};
use std::ops::Range;

/// Draws a token for some of the sampling rows of the mirror's step; `logits` are `[rows, vocabulary]` in their order.
fn draw(
    kernels: &CpuKernels,
    mirror: &Mirror,
    logits: Memory,
    dtype: Dtype,
    rows: Range<usize>,
) -> Result<Vec<DrawnRow>, Refused> {
    let samples = mirror.sample_slots().len();
    let slots = mirror
        .sample_slots()
        .get(rows.clone())
        .ok_or_else(|| Refused(format!("rows {} to {} of {samples} that sample do not exist", rows.start, rows.end)))?;
    let suppressed: Vec<Vec<Token>> =
        rows.clone().zip(slots).map(|(sample, &slot)| mirror.suppressed(sample, slot)).collect();
    let rows: Vec<SamplerRow<'_>> = rows
        .zip(slots)
        .zip(&suppressed)
        .map(|((sample, &slot), suppressed)| sampler_row(mirror, sample, slot, suppressed))
        .collect();
    let sampled = match dtype {
        Dtype::Float32 => run::<f32>(kernels, mirror.vocabulary(), logits, &rows),
        Dtype::Bfloat16 => run::<Bf16>(kernels, mirror.vocabulary(), logits, &rows),
    };
    Ok(sampled.map_err(|error| Refused::of(&error))?.into_iter().map(drawn_row).collect())
}

/// Which sampling rows are whose: rank `rank` has rows `row_bounds[rank]` to `row_bounds[rank + 1]`.
pub(crate) struct Share {
    pub(crate) row_bounds: Vec<usize>,
    pub(crate) rank: usize,
}

/// Draws a token for a rank's sampling rows and fills their part of the words that ranks tell each other. Returns where each
/// rank's part begins, and where the last ends.
pub(crate) fn draw_words(
    kernels: &CpuKernels,
    mirror: &Mirror,
    Share { row_bounds, rank }: Share,
    logits: Memory,
    dtype: Dtype,
    words: Memory,
) -> Result<Vec<usize>, Refused> {
    let (Some(&first), Some(&last)) = (row_bounds.get(rank), row_bounds.get(rank + 1)) else {
        return Err(Refused(format!("there are {} bounds and no rank {rank}", row_bounds.len())));
    };
    let rows = draw(kernels, mirror, logits, dtype, first..last)?;
    let bounds = SampledStep::of(mirror).word_bounds();
    // SAFETY: the caller holds a contiguous int32 tensor that nobody else touches during the call.
    let words = unsafe { view_mut::<u32>(words) };
    require_words(words.len(), &bounds)?;
    for (row, pair) in rows.iter().zip(bounds[first..=last].windows(2)) {
        drawn::write_row(row, &mut words[pair[0]..pair[1]]);
    }
    parts_of(&bounds, &row_bounds)
}

/// Where the words of each rank's rows begin, and where the last end.
pub(crate) fn word_parts(step: &SampledStep, row_bounds: &[usize]) -> Result<Vec<usize>, Refused> {
    parts_of(&step.word_bounds(), row_bounds)
}

fn parts_of(bounds: &[usize], row_bounds: &[usize]) -> Result<Vec<usize>, Refused> {
    let parts: Option<Vec<usize>> = row_bounds.iter().map(|&row| bounds.get(row).copied()).collect();
    parts.ok_or_else(|| Refused("the bounds divide more rows than sample".to_owned()))
}

fn require_words(given: usize, bounds: &[usize]) -> Result<(), Refused> {
    let needed = bounds.last().copied().unwrap_or(0);
    if given >= needed {
        return Ok(());
    }
    Err(Refused(format!("what ranks tell of this step's rows takes {needed} words, the buffer has {given}")))
}

/// The ids of rows as int32 for another stage, -1 where a row failed.
pub(crate) fn write_tokens(rows: &[DrawnRow], memory: Memory) -> Result<(), Refused> {
    if memory.1 < rows.len() {
        return Err(Refused(format!("{} rows sampled, the buffer takes {} ids", rows.len(), memory.1)));
    }
    // SAFETY: the caller holds a contiguous int32 tensor that nobody else touches during the call.
    let out = unsafe { view_mut::<i32>(memory) };
    for (out, row) in out.iter_mut().zip(rows) {
        *out = row.token.map_or(-1, |token| token as i32);
    }
    Ok(())
}

/// The reverse of [`write_tokens`].
pub(crate) fn read_tokens(memory: Memory, samples: usize) -> Result<Vec<Option<Token>>, Refused> {
    if memory.1 < samples {
        return Err(Refused(format!("{samples} rows sample, the buffer has {} ids", memory.1)));
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
) -> Result<Vec<SampledRow>, llmscale_kernels::error::KernelError> {
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

fn drawn_row(row: SampledRow) -> DrawnRow {
    let logprobs = row.logprobs.map(|RowLogprobs { chosen, top }| TokenLogprobs { chosen, top });
    DrawnRow { token: row.token.map_err(row_error), logprobs }
}

fn row_error(error: sampler::RowError) -> RowError {
    match error {
        sampler::RowError::NotFinite { .. } => RowError::NotANumber,
        sampler::RowError::NoCandidate => RowError::NothingToSample,
    }
}
