//! The sampler of a device as the processor does it: the same columns in, the same entries out, for memory that both reach.
//! It makes rows of the processor's sampler from columns and gives their results back, so every device's sampler has an
//! oracle. O(vocabulary) per row. Knows no mirror.
#![expect(unsafe_code, reason = "memory of torch is reached by address")]

use crate::error;
use crate::kernels::{CpuKernels, Dtype, Memory, view, view_mut};
use llmscale_engine::columns::{COLUMNS, MAX_LOGPROBS, SEEN, SUPPRESSED, drawn_entries};
use llmscale_kernels::element::{Bf16, Element};
use llmscale_kernels::sampler::{self, Logits, RowError, SampledRow, SamplerRow};
use pyo3::PyResult;

/// What changes in a row's logits.
#[derive(Default)]
struct Changed {
    suppressed: Vec<u32>,
    bias: Vec<(u32, f32)>,
    seen: Vec<u32>,
    counts: Vec<(u32, u32)>,
}

/// Samples a row of `[rows, vocabulary]` for each entry of the columns, into entries for `max_rows` rows.
pub(crate) fn sample(
    kernels: &CpuKernels,
    (logits, dtype, vocabulary): (Memory, Dtype, usize),
    columns: &[Memory],
    changes: &[Memory],
    (drawn, max_rows): (Memory, usize),
) -> PyResult<()> {
    if columns.len() != COLUMNS || changes.len() != 4 {
        let given = format!("{} columns and {} lists of changes", columns.len(), changes.len());
        return Err(error::worker(format!("a sampler takes {COLUMNS} columns and 4 lists of changes, not {given}")));
    }
    // SAFETY: the caller holds contiguous int32 tensors that nobody writes during the call.
    let columns: Vec<&[i32]> = columns.iter().map(|&memory| unsafe { view::<i32>(memory) }).collect();
    // SAFETY: as above.
    let changes: Vec<&[i32]> = changes.iter().map(|&memory| unsafe { view::<i32>(memory) }).collect();
    // SAFETY: the caller holds a contiguous int32 tensor that nobody else touches during the call.
    let drawn = unsafe { view_mut::<i32>(drawn) };
    let rows = columns[0].len();
    if drawn.len() < drawn_entries(max_rows) || rows > max_rows || columns[COLUMNS - 1].len() <= rows {
        return Err(error::worker(format!(
            "{rows} rows are sampled into room for {max_rows}, {} entries",
            drawn.len()
        )));
    }
    let changed: Vec<Changed> = (0..rows).map(|row| changed(columns[COLUMNS - 1], &changes, row)).collect();
    let asked: Vec<SamplerRow<'_>> =
        changed.iter().enumerate().map(|(row, changed)| sampler_row(&columns, row, changed)).collect();
    let sampled = match dtype {
        Dtype::Float32 => run::<f32>(kernels, vocabulary, logits, &asked),
        Dtype::Bfloat16 => run::<Bf16>(kernels, vocabulary, logits, &asked),
    };
    for (row, sampled) in sampled.map_err(|error| error::kernel(&error))?.into_iter().enumerate() {
        leave(&sampled, row, max_rows, drawn);
    }
    Ok(())
}

fn run<T: Element>(
    kernels: &CpuKernels,
    vocabulary: usize,
    logits: Memory,
    rows: &[SamplerRow<'_>],
) -> Result<Vec<SampledRow>, llmscale_kernels::error::KernelError> {
    // SAFETY: a contiguous tensor of this dtype, held and not written during the call.
    let values = unsafe { view::<T>(logits) };
    sampler::sample(&kernels.pool, kernels.level, &Logits { values, vocabulary, row_stride: vocabulary }, rows)
}

fn changed(starts: &[i32], changes: &[&[i32]], row: usize) -> Changed {
    let mut found = Changed::default();
    let of_row = starts[row] as usize..starts[row + 1] as usize;
    let [tokens, counts, flags, biases] = [0, 1, 2, 3].map(|list: usize| &changes[list][of_row.clone()]);
    for (((&token, &count), &flags), &bias) in tokens.iter().zip(counts).zip(flags).zip(biases) {
        let (token, count, bias) = (token as u32, count as u32, f32::from_bits(bias as u32));
        if flags & SUPPRESSED != 0 {
            found.suppressed.push(token);
        }
        if flags & SEEN != 0 {
            found.seen.push(token);
        }
        if count > 0 {
            found.counts.push((token, count));
        }
        if bias != 0.0 {
            found.bias.push((token, bias));
        }
    }
    found
}

fn sampler_row<'a>(columns: &[&[i32]], row: usize, changed: &'a Changed) -> SamplerRow<'a> {
    let float = |column: usize| f32::from_bits(columns[column][row] as u32);
    let word = |column: usize| columns[column][row] as u32;
    SamplerRow {
        temperature: float(0),
        top_p: float(1),
        min_p: float(2),
        repetition_penalty: float(3),
        presence_penalty: float(4),
        frequency_penalty: float(5),
        top_k: word(6),
        choice: word(7),
        position: word(8),
        logprobs: Some(word(9)),
        seed: u64::from(word(10)) | u64::from(word(11)) << 32,
        suppressed: &changed.suppressed,
        logit_bias: &changed.bias,
        allowed: None,
        prompt_tokens: &changed.seen,
        generated_counts: &changed.counts,
    }
}

fn leave(sampled: &SampledRow, row: usize, max_rows: usize, drawn: &mut [i32]) {
    let (status, token) = match sampled.token {
        Ok(token) => (0, token as i32),
        Err(RowError::NotFinite { .. }) => (1, 0),
        Err(RowError::NoCandidate) => (2, 0),
    };
    drawn[row] = status;
    drawn[max_rows + row] = token;
    let Some(logprobs) = &sampled.logprobs else { return };
    drawn[2 * max_rows + row] = logprobs.chosen.to_bits() as i32;
    drawn[3 * max_rows + row] = logprobs.top.len() as i32;
    let first = 4 * max_rows + row * MAX_LOGPROBS;
    for (rank, &(token, value)) in logprobs.top.iter().enumerate() {
        drawn[first + rank] = token as i32;
        drawn[first + max_rows * MAX_LOGPROBS + rank] = value.to_bits() as i32;
    }
}
