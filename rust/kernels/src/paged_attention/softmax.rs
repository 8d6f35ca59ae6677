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

/// The running state of one query vector within a split.
#[derive(Clone, Copy)]
pub(super) struct RowState {
    /// Greatest raw score so far; minus infinity before the first tile.
    pub(super) maximum: *mut f32,
    /// `LANES` partial denominators.
    pub(super) denominators: *mut f32,
    /// Written: the factor by which sums so far must be rescaled.
    pub(super) factor: *mut f32,
}

/// Replaces the scores of `tokens` by their weights relative to the new maximum, others by zero, and updates the state.
/// `scale` is the softmax scale times log2(e).
///
/// # Safety
/// `scores` holds `TILE_TOKENS` f32, the state's pointers what their comments say.
#[inline(always)]
pub(super) unsafe fn tile_softmax<S: Simd, const PAIRS: bool>(
    simd: S,
    scores: *mut f32,
    tokens: Range<usize>,
    scale: f32,
    state: RowState,
) {
    let vectors = TILE_TOKENS / S::LANES;
    let minus_infinity = simd.splat(f32::NEG_INFINITY);
    let partial = tokens.len() < TILE_TOKENS;
    let mut score = [minus_infinity; MAX_VECTORS];
    let mut inside = [simd.lane_range(0, S::LANES); MAX_VECTORS];
    // SAFETY: the caller's promise.
    unsafe {
        let mut greatest = minus_infinity;
        for vector in 0..vectors {
            score[vector] = simd.load(scores.add(vector * S::LANES));
            if partial {
                let lane = |token: usize| token.saturating_sub(vector * S::LANES).min(S::LANES);
                inside[vector] = simd.lane_range(lane(tokens.start), lane(tokens.end));
                score[vector] = simd.select(inside[vector], score[vector], minus_infinity);
            }
            greatest = simd.max(score[vector], greatest);
        }
        let old = *state.maximum;
        let tile_maximum = simd.reduce_max(greatest);
        let maximum = if tile_maximum > old { tile_maximum } else { old };
        let scale_vector = simd.splat(scale);
        // 2^0 is exactly 1, so an unchanged maximum leaves sums and denominators as they are.
        let factor = fast::exp2::<S, true>(simd, simd.splat((old - maximum) * scale));
        let offset = simd.splat(-maximum * scale);
        let mut total = simd.splat(0.0);
        let mut weights = [simd.splat(0.0); MAX_VECTORS];
        for vector in 0..vectors {
            let exponent = simd.mul_add(score[vector], scale_vector, offset);
            let mut weight =
                if PAIRS { fast::exp2::<S, false>(simd, exponent) } else { fast::exp2::<S, true>(simd, exponent) };
            if partial {
                weight = simd.select(inside[vector], weight, simd.splat(0.0));
            }
            total = simd.add(total, weight);
            weights[vector] = weight;
        }
        let denominators = simd.load(state.denominators);
        simd.store(state.denominators, simd.add(simd.mul(denominators, factor), total));
        simd.store_partial(state.factor, factor, 1);
        *state.maximum = maximum;
        for (vector, weight) in weights.into_iter().enumerate().take(vectors) {
            if PAIRS {
                simd.store_bf16(scores.cast::<Bf16>().add(vector * S::LANES), weight);
            } else {
                simd.store(scores.add(vector * S::LANES), weight);
            }
        }
    }
}

/// The result of some splits for one query vector.
#[derive(Clone, Copy)]
pub(super) struct SplitResult {
    /// Greatest raw score; minus infinity where the vector has no token in the splits.
    pub(super) maximum: *mut f32,
    /// Sum of weights relative to the maximum.
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
        if added == f32::NEG_INFINITY {
            return;
        }
        if before == f32::NEG_INFINITY {
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
