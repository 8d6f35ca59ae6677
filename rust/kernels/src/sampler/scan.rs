//! A row of scores as blocks of 64, and the first pass over it: block maxima and a check for broken numbers.
//! O(vocabulary), one read. The maxima serve everything later: the arg max, the choice of thresholds, and the skipping.
#![expect(unsafe_code, reason = "vector loads and stores on raw pointers")]

use super::{BLOCK_TOKENS, RowError};
use crate::simd::Simd;
use core::cmp::Ordering;

/// Scores of one row in whole blocks: the last block is a copy, padded with minus infinity.
#[derive(Clone, Copy)]
pub(super) struct Scores {
    values: *const f32,
    last: *const f32,
    vocabulary: usize,
}

impl Scores {
    /// # Safety
    /// `values` must hold `vocabulary` f32 and `last` must have room for 64, both while the result is in use.
    #[inline(always)]
    pub(super) unsafe fn new(values: *const f32, last: *mut f32, vocabulary: usize) -> Self {
        let whole = (vocabulary - 1) / BLOCK_TOKENS * BLOCK_TOKENS;
        // SAFETY: the caller's promise; `whole < vocabulary`.
        unsafe {
            for offset in 0..BLOCK_TOKENS {
                let inside = whole + offset < vocabulary;
                *last.add(offset) = if inside { *values.add(whole + offset) } else { f32::NEG_INFINITY };
            }
        }
        Self { values, last, vocabulary }
    }

    pub(super) fn vocabulary(&self) -> usize {
        self.vocabulary
    }

    pub(super) fn blocks(&self) -> usize {
        self.vocabulary.div_ceil(BLOCK_TOKENS)
    }

    /// The 64 scores of a block.
    #[inline(always)]
    pub(super) fn block(&self, block: usize) -> *const f32 {
        assert!(block < self.blocks());
        if block + 1 == self.blocks() { self.last } else { self.values.wrapping_add(block * BLOCK_TOKENS) }
    }

    /// One score.
    #[inline(always)]
    pub(super) fn get(&self, token: usize) -> f32 {
        // SAFETY: the block has 64 values, and `block` checks its number.
        unsafe { *self.block(token / BLOCK_TOKENS).add(token % BLOCK_TOKENS) }
    }

    /// Writes the maximum of every block and returns the greatest.
    ///
    /// # Errors
    /// The first token that is NaN or plus infinity, or [`RowError::NoCandidate`] where all are minus infinity.
    #[inline(always)]
    pub(super) fn scan<S: Simd>(&self, simd: S, maxima: &mut [f32]) -> Result<f32, RowError> {
        assert_eq!(maxima.len(), self.blocks());
        let zero = simd.splat(0.0);
        // Zero times anything finite is zero; a NaN or infinity anywhere leaves a NaN in the sum.
        let mut suspicion = zero;
        let last = maxima.len() - 1;
        for (block, maximum) in maxima.iter_mut().enumerate() {
            let values = self.block(block);
            let mut greatest = simd.splat(f32::NEG_INFINITY);
            for offset in (0..BLOCK_TOKENS).step_by(S::LANES) {
                // SAFETY: a block has 64 values.
                let value = unsafe { simd.load(values.add(offset)) };
                greatest = simd.max(value, greatest);
                // The padding of the last block is infinite by design, so that block is checked below.
                if block < last {
                    suspicion = simd.mul_add(value, zero, suspicion);
                }
            }
            *maximum = simd.reduce_max(greatest);
        }
        let broken = |token: &usize| self.get(*token).is_nan() || self.get(*token) == f32::INFINITY;
        let unchecked = if simd.reduce_add(suspicion).is_nan() { 0 } else { last * BLOCK_TOKENS };
        if let Some(token) = (unchecked..self.vocabulary).find(broken) {
            return Err(RowError::NotFinite { token: token as u32 });
        }
        let greatest = maxima.iter().copied().fold(f32::NEG_INFINITY, |a, b| if a > b { a } else { b });
        if greatest == f32::NEG_INFINITY { Err(RowError::NoCandidate) } else { Ok(greatest) }
    }

    /// The lowest token whose score is `greatest`, the maximum found by [`Self::scan`].
    #[inline(always)]
    pub(super) fn first_equal(&self, maxima: &[f32], greatest: f32) -> u32 {
        let block = maxima.iter().position(|&maximum| maximum >= greatest).expect("the maximum is in some block");
        let start = block * BLOCK_TOKENS;
        let token = (start..self.vocabulary).find(|&token| self.get(token) >= greatest);
        token.expect("the block holds its maximum") as u32
    }

    /// Collects all (score, token) with a score of at least `least`, in order of token.
    #[inline(always)]
    pub(super) fn collect_at_least<S: Simd>(&self, simd: S, maxima: &[f32], least: f32, entries: &mut Vec<(f32, u32)>) {
        entries.clear();
        for (block, &maximum) in maxima.iter().enumerate() {
            if maximum < least {
                continue;
            }
            let values = self.block(block);
            for offset in (0..BLOCK_TOKENS).step_by(S::LANES) {
                // SAFETY: a block has 64 values.
                let value = unsafe { simd.load(values.add(offset)) };
                let mut wanted = !simd.mask_bits(simd.less(value, simd.splat(least))) & (u32::MAX >> (32 - S::LANES));
                while wanted != 0 {
                    let token = block * BLOCK_TOKENS + offset + wanted.trailing_zeros() as usize;
                    wanted &= wanted - 1;
                    if token < self.vocabulary {
                        entries.push((self.get(token), token as u32));
                    }
                }
            }
        }
    }
}

/// A lower bound of the `count`-th greatest score: the `count`-th greatest block maximum, or minus infinity.
#[inline(always)]
pub(super) fn lower_bound_of_nth(maxima: &[f32], count: usize, copy: &mut Vec<f32>) -> f32 {
    if count > maxima.len() {
        return f32::NEG_INFINITY;
    }
    copy.clear();
    copy.extend_from_slice(maxima);
    *copy.select_nth_unstable_by(count - 1, |a, b| b.total_cmp(a)).1
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "the signature that sorting asks for")]
/// Order of (score, token): the greatest score first, the lower id first among equals. Zeros of either sign are equal,
/// as they are to the comparisons of vectors; there is no NaN after the scan.
pub(super) fn most_likely_first(a: &(f32, u32), b: &(f32, u32)) -> Ordering {
    b.0.partial_cmp(&a.0).expect("scores are not NaN").then(a.1.cmp(&b.1))
}
