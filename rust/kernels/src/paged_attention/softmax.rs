//! The online softmax of one query vector over one tile, and the ordered merge of splits.
//! Keeps a running maximum of raw scores, a denominator per lane and unnormalised sums (Milakov and Gimelshein 2018).
//! O(tile) and O(head size). Weights are rounded to bf16 where the sums are taken with bf16 pairs; denominators are not.
#![expect(unsafe_code, reason = "vector loads and stores on scratch memory")]

use super::TILE_TOKENS;
use crate::element::Bf16;
use crate::simd::{Simd, fast};
use core::ops::Range;

/// Vectors of a tile's scores at 8 lanes, the narrowest.
const MAX_VECTORS: usize = TILE_TOKENS / 8;

/// Masks the scores outside of `tokens` in the vector that begins at token `first`.
#[inline(always)]
fn inside<S: Simd>(simd: S, tokens: &Range<usize>, first: usize) -> S::Mask {
    let lane = |token: usize| token.saturating_sub(first).min(S::LANES);
    simd.lane_range(lane(tokens.start), lane(tokens.end))
}

/// Brings the scales of a tile's keys to one query vector's scores.
///
/// # Safety
/// `scores` and `scales` hold `TILE_TOKENS` f32.
#[inline(always)]
pub(super) unsafe fn scale_scores<S: Simd>(simd: S, scores: *mut f32, scales: *const f32) {
    for first in (0..TILE_TOKENS).step_by(S::LANES) {
        // SAFETY: the caller's promise.
        unsafe {
            let scaled = simd.mul(simd.load(scores.add(first)), simd.load(scales.add(first)));
            simd.store(scores.add(first), scaled);
        }
    }
}

/// Raises the running maximum of one query vector to that of its scores at `tokens`, and writes the exponent of the
/// factor that brings older sums to the new maximum. `scale` is the softmax scale times log2(e).
///
/// # Safety
/// `scores` holds `TILE_TOKENS` f32; the other pointers are valid.
#[inline(always)]
pub(super) unsafe fn raise_maximum<S: Simd>(
    simd: S,
    scores: *const f32,
    tokens: &Range<usize>,
    scale: f32,
    maximum: *mut f32,
    factor_exponent: *mut f32,
) {
    let minus_infinity = simd.splat(f32::NEG_INFINITY);
    let mut greatest = minus_infinity;
    // SAFETY: the caller's promise.
    unsafe {
        for first in (0..TILE_TOKENS).step_by(S::LANES) {
            let mut score = simd.load(scores.add(first));
            if tokens.len() < TILE_TOKENS {
                score = simd.select(inside(simd, tokens, first), score, minus_infinity);
            }
            greatest = simd.max(score, greatest);
        }
        let (old, new) = (*maximum, simd.reduce_max(greatest));
        let new = if new > old { new } else { old };
        *maximum = new;
        // Where the maximum stays this is 0, and 2^0 is exactly 1: sums and denominators stay as they are.
        *factor_exponent = (old - new) * scale;
    }
}

/// Turns exponents into factors, in place. Reads and writes whole vectors.
///
/// # Safety
/// `factors` holds `count` f32 rounded up to whole vectors.
#[inline(always)]
pub(super) unsafe fn exponents_to_factors<S: Simd>(simd: S, factors: *mut f32, count: usize) {
    for at in (0..count).step_by(S::LANES) {
        // SAFETY: the caller's promise.
        unsafe { simd.store(factors.add(at), fast::exp2::<S, true>(simd, simd.load(factors.add(at)))) };
    }
}

/// Replaces the scores at `tokens` by their weights relative to the maximum, others by zero, and adds them to the
/// denominators, one per lane. What is left are weights times `value_scales` where values have scales.
///
/// # Safety
/// `scores` holds `TILE_TOKENS` f32, `denominators` `LANES`, `value_scales` `TILE_TOKENS` where `SCALED`.
#[inline(always)]
pub(super) unsafe fn scores_to_weights<S: Simd, const PAIRS: bool, const SCALED: bool>(
    simd: S,
    scores: *mut f32,
    tokens: &Range<usize>,
    scale: f32,
    (maximum, factor, denominators): (f32, f32, *mut f32),
    value_scales: *const f32,
) {
    let (scale, offset) = (simd.splat(scale), simd.splat(-maximum * scale));
    let mut weights = [simd.splat(0.0); MAX_VECTORS];
    let vectors = TILE_TOKENS / S::LANES;
    // SAFETY: the caller's promise. All scores are read before the first weight is written over them.
    unsafe {
        for (vector, weight) in weights.iter_mut().enumerate().take(vectors) {
            let exponent = simd.mul_add(simd.load(scores.add(vector * S::LANES)), scale, offset);
            *weight =
                if PAIRS { fast::exp2::<S, false>(simd, exponent) } else { fast::exp2::<S, true>(simd, exponent) };
            if tokens.len() < TILE_TOKENS {
                *weight = simd.select(inside(simd, tokens, vector * S::LANES), *weight, simd.splat(0.0));
            }
        }
        let mut total = simd.mul(simd.load(denominators), simd.splat(factor));
        for (vector, weight) in weights.into_iter().enumerate().take(vectors) {
            total = simd.add(total, weight);
            let mut weight = weight;
            if SCALED {
                weight = simd.mul(weight, simd.load(value_scales.add(vector * S::LANES)));
                if tokens.len() < TILE_TOKENS {
                    // Another row's token may have a scale that is no number.
                    weight = simd.select(inside(simd, tokens, vector * S::LANES), weight, simd.splat(0.0));
                }
            }
            if PAIRS {
                simd.store_bf16(scores.cast::<Bf16>().add(vector * S::LANES), weight);
            } else {
                simd.store(scores.add(vector * S::LANES), weight);
            }
        }
        simd.store(denominators, total);
    }
}

/// The result of some splits for one query vector.
#[derive(Clone, Copy)]
pub(super) struct SplitResult {
    /// Greatest raw score; minus infinity where the vector has no token in the splits, or no score that is a number.
    pub(super) maximum: *mut f32,
    /// Sum of weights relative to the maximum; zero where the vector has no token in the splits.
    pub(super) denominator: *mut f32,
    /// `padded_dim` unnormalised sums.
    pub(super) sums: *mut f32,
}

/// Adds the result of the next split to the total of the splits before it.
///
/// # Safety
/// The pointers hold what their comments say, `padded_dim` being whole vectors; `total` and `next` do not overlap.
#[inline(always)]
pub(super) unsafe fn merge_split<S: Simd>(
    simd: S,
    total: SplitResult,
    next: SplitResult,
    padded_dim: usize,
    scale: f32,
) {
    // SAFETY: the caller's promise.
    unsafe {
        let (before, added) = (*total.maximum, *next.maximum);
        // Scores that are no numbers leave the maximum where it was and make the denominator none either: such a result
        // counts, or the vector would be written as whatever the scratch held before.
        if added == f32::NEG_INFINITY && *next.denominator == 0.0 {
            return;
        }
        if before == f32::NEG_INFINITY && *total.denominator == 0.0 {
            *total.maximum = added;
            *total.denominator = *next.denominator;
            core::ptr::copy_nonoverlapping(next.sums, total.sums, padded_dim);
            return;
        }
        let maximum = if added > before { added } else { before };
        let keep = fast::exp2::<S, true>(simd, simd.splat((before - maximum) * scale));
        let take = fast::exp2::<S, true>(simd, simd.splat((added - maximum) * scale));
        let denominator =
            simd.mul_add(simd.splat(*next.denominator), take, simd.mul(simd.splat(*total.denominator), keep));
        simd.store_partial(total.denominator, denominator, 1);
        *total.maximum = maximum;
        for dim in (0..padded_dim).step_by(S::LANES) {
            let kept = simd.mul(simd.load(total.sums.add(dim)), keep);
            simd.store(total.sums.add(dim), simd.mul_add(simd.load(next.sums.add(dim)), take, kept));
        }
    }
}
