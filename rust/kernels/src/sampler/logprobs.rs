//! Log probabilities of the model's own distribution for one row.
//! The sum of exponentials is f64 over f32 terms, in one order at every level; the results are f32. O(vocabulary) for
//! the sum, O(count log count) for the most likely tokens, which come from the blocks that can hold them.
#![expect(unsafe_code, reason = "vector loads on raw pointers")]

use super::scan::{Scores, lower_bound_of_nth, most_likely_first};
use super::{BLOCK_TOKENS, RowLogprobs};
use crate::simd::{Simd, exact};

/// The unmodified logits of a row.
pub(super) struct ModelDistribution<'a, S> {
    pub(super) simd: S,
    pub(super) logits: &'a Scores,
    pub(super) maxima: &'a [f32],
    pub(super) greatest: f32,
}

impl<S: Simd> ModelDistribution<'_, S> {
    /// The log probabilities of a token and of the `count` most likely ones.
    #[inline(always)]
    pub(super) fn logprobs(&self, chosen: u32, count: usize) -> RowLogprobs {
        let log_sum = self.sum_of_exponentials().ln();
        let logprob = |logit: f32| (f64::from(logit) - f64::from(self.greatest) - log_sum) as f32;
        let top = self.most_likely(count).into_iter().map(|(logit, token)| (token, logprob(logit))).collect();
        RowLogprobs { chosen: logprob(self.logits.get(chosen as usize)), top }
    }

    /// Relative to the greatest logit, so at least 1.
    #[inline(always)]
    fn sum_of_exponentials(&self) -> f64 {
        let simd = self.simd;
        let mut sums = simd.zero_sums();
        let minus_infinity = simd.splat(f32::NEG_INFINITY);
        for block in 0..self.maxima.len() {
            let values = self.logits.block(block);
            for (vector, offset) in (0..BLOCK_TOKENS).step_by(S::LANES).enumerate() {
                // SAFETY: a block has 64 values.
                let logit = unsafe { simd.load(values.add(offset)) };
                let term = exact::exp(simd, simd.sub(logit, simd.splat(self.greatest)));
                let possible = simd.less(minus_infinity, logit);
                sums = simd.add_to_sums(sums, vector, simd.select(possible, term, simd.splat(0.0)));
            }
        }
        simd.total_of_sums(sums)
    }

    #[inline(always)]
    fn most_likely(&self, count: usize) -> Vec<(f32, u32)> {
        let count = count.min(self.logits.vocabulary());
        let mut entries = Vec::new();
        if count > 0 {
            let bound = lower_bound_of_nth(self.maxima, count, &mut Vec::new());
            self.logits.collect_at_least(self.simd, self.maxima, bound, &mut entries);
            entries.sort_unstable_by(most_likely_first);
            entries.truncate(count);
        }
        entries
    }
}
