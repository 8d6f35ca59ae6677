//! The path of one row through the sampler, and the working memory that a thread keeps for it.
//! Rows of f32 logits without penalties are read in place; bf16 rows are widened once, changed rows are copied once.
#![expect(unsafe_code, reason = "vector loads and stores on raw pointers")]

use super::filter::{Filter, FilterScratch, Scale};
use super::logprobs::ModelDistribution;
use super::philox::{NoiseKey, Purpose};
use super::race::Race;
use super::scan::Scores;
use super::{BLOCK_TOKENS, MIN_TEMPERATURE, RowError, SampledRow, SamplerRow};
use crate::dispatch::Kernel;
use crate::element::Element;
use crate::simd::{Simd, load_element, load_element_partial};
use core::cell::RefCell;

/// Working memory of the rows that a thread samples.
#[derive(Default)]
pub(super) struct RowScratch {
    widened: Vec<f32>,
    changed: Vec<f32>,
    model_maxima: Vec<f32>,
    changed_maxima: Vec<f32>,
    scaled_maxima: Vec<f32>,
    bounds: Vec<f32>,
    filter: FilterScratch,
}

thread_local! {
    static SCRATCH: RefCell<RowScratch> = RefCell::new(RowScratch::default());
}

/// Lends this thread's working memory. Called outside of the kernel, because a closure is compiled for the baseline.
pub(super) fn with_scratch<R>(user: impl FnOnce(&mut RowScratch) -> R) -> R {
    SCRATCH.with_borrow_mut(user)
}

/// A copy of a row's last, possibly incomplete block.
#[repr(align(64))]
struct LastBlock([f32; BLOCK_TOKENS]);

/// Samples one row.
pub(super) struct RowKernel<'a, T> {
    pub(super) logits: &'a [T],
    pub(super) row: &'a SamplerRow<'a>,
    pub(super) scratch: &'a mut RowScratch,
}

impl<T: Element> Kernel for RowKernel<'_, T> {
    type Output = SampledRow;

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> SampledRow {
        let mut logprobs = None;
        let token = sample_row(simd, self.logits, self.row, self.scratch, &mut logprobs);
        SampledRow { token, logprobs }
    }
}

#[inline(always)]
fn sample_row<S: Simd, T: Element>(
    simd: S,
    logits: &[T],
    row: &SamplerRow<'_>,
    scratch: &mut RowScratch,
    logprobs: &mut Option<super::RowLogprobs>,
) -> Result<u32, RowError> {
    let vocabulary = logits.len();
    let blocks = vocabulary.div_ceil(BLOCK_TOKENS);
    let values = if T::IS_BF16 {
        widen(simd, logits, &mut scratch.widened);
        scratch.widened.as_ptr()
    } else {
        logits.as_ptr().cast::<f32>()
    };
    let mut last = LastBlock([0.0; BLOCK_TOKENS]);
    // SAFETY: `values` holds the row's f32 and outlives the scores, as does `last`.
    let model = unsafe { Scores::new(values, last.0.as_mut_ptr(), vocabulary) };
    scratch.model_maxima.resize(blocks, 0.0);
    let model_greatest = model.scan(simd, &mut scratch.model_maxima)?;

    let mut changed_last = LastBlock([0.0; BLOCK_TOKENS]);
    let (scores, maxima, greatest) = if row.changes_logits() {
        scratch.changed.clear();
        // SAFETY: `values` holds the row's f32.
        scratch.changed.extend_from_slice(unsafe { core::slice::from_raw_parts(values, vocabulary) });
        row.change_logits(&mut scratch.changed);
        // SAFETY: as for the model's scores.
        let scores = unsafe { Scores::new(scratch.changed.as_ptr(), changed_last.0.as_mut_ptr(), vocabulary) };
        scratch.changed_maxima.resize(blocks, 0.0);
        let greatest = scores.scan(simd, &mut scratch.changed_maxima)?;
        (scores, &scratch.changed_maxima, greatest)
    } else {
        (model, &scratch.model_maxima, model_greatest)
    };

    let token = if row.temperature < MIN_TEMPERATURE {
        scores.first_equal(maxima, greatest)
    } else {
        let scale = Scale { greatest, inverse_temperature: 1.0 / row.temperature };
        scratch.scaled_maxima.clear();
        scratch.scaled_maxima.extend(maxima.iter().map(|&maximum| scale.apply(maximum)));
        let maxima = &scratch.scaled_maxima;
        let mut filter = Filter { simd, scores: &scores, maxima, scale, scratch: &mut scratch.filter };
        let threshold = filter.threshold(row);
        let (seed, choice, position) = (row.seed, row.choice, row.position);
        let stream = NoiseKey { seed, choice, position, purpose: Purpose::Token };
        Race { simd, scores: &scores, maxima, scale, threshold, stream }.run(&mut scratch.bounds)
    };
    if let Some(count) = row.logprobs {
        let maxima = &scratch.model_maxima;
        let distribution = ModelDistribution { simd, logits: &model, maxima, greatest: model_greatest };
        *logprobs = Some(distribution.logprobs(token, count as usize));
    }
    Ok(token)
}

/// Copies a row of either format as f32.
#[inline(always)]
fn widen<S: Simd, T: Element>(simd: S, logits: &[T], widened: &mut Vec<f32>) {
    widened.resize(logits.len(), 0.0);
    let (source, target) = (logits.as_ptr(), widened.as_mut_ptr());
    let mut at = 0;
    while at < logits.len() {
        let count = (logits.len() - at).min(S::LANES);
        // SAFETY: both arrays hold `at + count` elements.
        unsafe {
            if count == S::LANES {
                simd.store(target.add(at), load_element(simd, source.add(at)));
            } else {
                simd.store_partial(target.add(at), load_element_partial(simd, source.add(at), count), count);
            }
        }
        at += count;
    }
}
