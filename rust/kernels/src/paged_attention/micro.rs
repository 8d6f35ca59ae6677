//! The two matrix products of a tile, as register-blocked micro-kernels: scores = Q K^T and sums += P V.
//! A unit is 32 bits: one f32, or two bf16 that one instruction multiplies and adds. Each output lane is one chain of
//! multiply-adds in the order of its units, whatever the blocking, so blocking never changes bits.
#![expect(unsafe_code, reason = "micro-kernels on packed scratch memory")]

use super::TILE_TOKENS;
use crate::simd::Simd;

/// Adds the products of one unit: two bf16 pairs or one f32 pair.
#[inline(always)]
fn multiply_add<S: Simd, const PAIRS: bool>(simd: S, sum: S::F32, a: S::U32, b: S::U32) -> S::F32 {
    if PAIRS { simd.dot_bf16(sum, a, b) } else { simd.mul_add(simd.bits_to_f32(a), simd.bits_to_f32(b), sum) }
}

/// Calls a micro-kernel over `rows` rows in blocks of six (12 or 24 sums in registers) and one block for the rest.
macro_rules! in_row_blocks {
    ($rows:expr, |$first:ident| $kernel:ident::<$simd:ty, $pairs:ident, _, $vectors:literal>($($argument:expr),*)) => {{
        let rows: usize = $rows;
        let mut $first = 0;
        while $first < rows {
            match rows - $first {
                1 => $kernel::<$simd, $pairs, 1, $vectors>($($argument),*),
                2 => $kernel::<$simd, $pairs, 2, $vectors>($($argument),*),
                3 => $kernel::<$simd, $pairs, 3, $vectors>($($argument),*),
                4 => $kernel::<$simd, $pairs, 4, $vectors>($($argument),*),
                5 => $kernel::<$simd, $pairs, 5, $vectors>($($argument),*),
                _ => $kernel::<$simd, $pairs, 6, $vectors>($($argument),*),
            }
            $first += 6;
        }
    }};
}

/// `scores[r][t] = sum over units of queries[r][u] * keys[u][t]` for the first `tokens` tokens, rounded up to a
/// whole number of register blocks, of a tile.
///
/// # Safety
/// `queries` holds `rows x units` words, `keys` `units x TILE_TOKENS`, `scores` `rows x TILE_TOKENS`.
#[inline(always)]
pub(super) unsafe fn scores<S: Simd, const PAIRS: bool>(
    simd: S,
    rows: usize,
    units: usize,
    queries: *const u32,
    keys: *const u32,
    scores: *mut f32,
    tokens: core::ops::Range<usize>,
) {
    let step = if S::LANES == 16 { 4 * S::LANES } else { 2 * S::LANES };
    let mut column = tokens.start / step * step;
    while column < tokens.end {
        // SAFETY: row blocks lie within `rows`, columns within `TILE_TOKENS`, which `step` divides.
        unsafe {
            let (keys, scores) = (keys.add(column), scores.add(column));
            if S::LANES == 16 {
                in_row_blocks!(rows, |first| score_block::<S, PAIRS, _, 4>(
                    simd,
                    units,
                    queries.add(first * units),
                    keys,
                    scores.add(first * TILE_TOKENS)
                ));
            } else {
                in_row_blocks!(rows, |first| score_block::<S, PAIRS, _, 2>(
                    simd,
                    units,
                    queries.add(first * units),
                    keys,
                    scores.add(first * TILE_TOKENS)
                ));
            }
        }
        column += step;
    }
}

/// # Safety
/// As [`scores`], for `ROWS` rows and `VECTORS` vectors of tokens.
#[inline(always)]
unsafe fn score_block<S: Simd, const PAIRS: bool, const ROWS: usize, const VECTORS: usize>(
    simd: S,
    units: usize,
    queries: *const u32,
    keys: *const u32,
    scores: *mut f32,
) {
    let mut sums = [[simd.splat(0.0); VECTORS]; ROWS];
    // SAFETY: the caller's promise.
    unsafe {
        let mut source = keys;
        for unit in 0..units {
            let mut key = [simd.splat_u32(0); VECTORS];
            for (vector, key) in key.iter_mut().enumerate() {
                *key = simd.load_u32(source.add(vector * S::LANES));
            }
            source = source.wrapping_add(TILE_TOKENS);
            for (row, sums) in sums.iter_mut().enumerate() {
                let query = simd.splat_u32(*queries.add(row * units + unit));
                for (sum, key) in sums.iter_mut().zip(key) {
                    *sum = multiply_add::<S, PAIRS>(simd, *sum, query, key);
                }
            }
        }
        for (row, sums) in sums.into_iter().enumerate() {
            for (vector, sum) in sums.into_iter().enumerate() {
                simd.store(scores.add(row * TILE_TOKENS + vector * S::LANES), sum);
            }
        }
    }
}

/// The operands of `sums[r] = sums[r] * factors[r] + sum over token units of weights[r][t] * values[t]`.
#[derive(Clone, Copy)]
pub(super) struct Accumulate {
    /// `rows x TILE_TOKENS` words, of which the first token units are used.
    pub(super) weights: *const u32,
    /// `token units x padded_dim` words.
    pub(super) values: *const u32,
    /// `rows x padded_dim`.
    pub(super) sums: *mut f32,
    /// One rescaling factor per row.
    pub(super) factors: *const f32,
    /// Head dimension rounded up to whole vectors.
    pub(super) padded_dim: usize,
}

impl Accumulate {
    /// Accumulates the first `token_units` units for `rows` rows.
    ///
    /// # Safety
    /// The arrays are as long as their comments say.
    #[inline(always)]
    pub(super) unsafe fn full_rows<S: Simd, const PAIRS: bool>(self, simd: S, rows: usize, token_units: usize) {
        let wide = if S::LANES == 16 { 4 * S::LANES } else { 2 * S::LANES };
        let mut dim = 0;
        // SAFETY: the caller's promise; `padded_dim` is a multiple of `LANES`.
        unsafe {
            while dim < self.padded_dim {
                if self.padded_dim - dim < wide {
                    in_row_blocks!(rows, |first| sum_block::<S, PAIRS, _, 1>(simd, self, token_units, first, dim));
                    dim += S::LANES;
                } else if S::LANES == 16 {
                    in_row_blocks!(rows, |first| sum_block::<S, PAIRS, _, 4>(simd, self, token_units, first, dim));
                    dim += wide;
                } else {
                    in_row_blocks!(rows, |first| sum_block::<S, PAIRS, _, 2>(simd, self, token_units, first, dim));
                    dim += wide;
                }
            }
        }
    }

    /// Accumulates only the tokens of `tokens` for one row. A pair of which one token is outside is masked, so that the
    /// value outside is not even multiplied by zero.
    ///
    /// # Safety
    /// The arrays are as long as their comments say, and the units of `tokens` are packed.
    #[inline(always)]
    pub(super) unsafe fn partial_row<S: Simd, const PAIRS: bool>(
        self,
        simd: S,
        row: usize,
        tokens: core::ops::Range<usize>,
    ) {
        let mut dim = 0;
        // SAFETY: the caller's promise; `padded_dim` is a multiple of `LANES`.
        unsafe {
            while dim < self.padded_dim {
                if self.padded_dim - dim >= 4 * S::LANES {
                    partial_block::<S, PAIRS, 4>(simd, self, row, &tokens, dim);
                    dim += 4 * S::LANES;
                } else {
                    partial_block::<S, PAIRS, 1>(simd, self, row, &tokens, dim);
                    dim += S::LANES;
                }
            }
        }
    }
}

/// # Safety
/// As [`Accumulate::partial_row`], for `VECTORS` vectors of dimensions from `dim`.
#[inline(always)]
unsafe fn partial_block<S: Simd, const PAIRS: bool, const VECTORS: usize>(
    simd: S,
    operands: Accumulate,
    row: usize,
    tokens: &core::ops::Range<usize>,
    dim: usize,
) {
    let per_unit = if PAIRS { 2 } else { 1 };
    let (from, to) = (tokens.start / per_unit, tokens.end.div_ceil(per_unit));
    let head = if PAIRS && !tokens.start.is_multiple_of(2) { 0xffff_0000 } else { u32::MAX };
    let tail = if PAIRS && !tokens.end.is_multiple_of(2) { 0x0000_ffff } else { u32::MAX };
    // SAFETY: the caller's promise.
    unsafe {
        let sums = operands.sums.add(row * operands.padded_dim + dim);
        let factor = simd.splat(*operands.factors.add(row));
        let mut sum = [simd.splat(0.0); VECTORS];
        for (vector, sum) in sum.iter_mut().enumerate() {
            *sum = simd.mul(simd.load(sums.add(vector * S::LANES)), factor);
        }
        let mut value = operands.values.add(from * operands.padded_dim + dim);
        let weights = operands.weights.add(row * TILE_TOKENS);
        for unit in from..to {
            let mask = if unit == from { head } else { u32::MAX } & if unit + 1 == to { tail } else { u32::MAX };
            let (mask, weight) = (simd.splat_u32(mask), simd.splat_u32(*weights.add(unit)));
            for (vector, sum) in sum.iter_mut().enumerate() {
                let masked = simd.and_u32(simd.load_u32(value.add(vector * S::LANES)), mask);
                *sum = multiply_add::<S, PAIRS>(simd, *sum, weight, masked);
            }
            value = value.wrapping_add(operands.padded_dim);
        }
        for (vector, sum) in sum.into_iter().enumerate() {
            simd.store(sums.add(vector * S::LANES), sum);
        }
    }
}

/// # Safety
/// As [`Accumulate::full_rows`], for `ROWS` rows from `first` and `VECTORS` vectors of dimensions from `dim`.
#[inline(always)]
unsafe fn sum_block<S: Simd, const PAIRS: bool, const ROWS: usize, const VECTORS: usize>(
    simd: S,
    operands: Accumulate,
    token_units: usize,
    first: usize,
    dim: usize,
) {
    let padded_dim = operands.padded_dim;
    // SAFETY: the caller's promise.
    unsafe {
        let weights = operands.weights.add(first * TILE_TOKENS);
        let values = operands.values.add(dim);
        let target = operands.sums.add(first * padded_dim + dim);
        let mut sums = [[simd.splat(0.0); VECTORS]; ROWS];
        for (row, sums) in sums.iter_mut().enumerate() {
            let factor = simd.splat(*operands.factors.add(first + row));
            for (vector, sum) in sums.iter_mut().enumerate() {
                *sum = simd.mul(simd.load(target.add(row * padded_dim + vector * S::LANES)), factor);
            }
        }
        let mut source = values;
        for unit in 0..token_units {
            let mut value = [simd.splat_u32(0); VECTORS];
            for (vector, value) in value.iter_mut().enumerate() {
                *value = simd.load_u32(source.add(vector * S::LANES));
            }
            source = source.wrapping_add(padded_dim);
            for (row, sums) in sums.iter_mut().enumerate() {
                let weight = simd.splat_u32(*weights.add(row * TILE_TOKENS + unit));
                for (sum, value) in sums.iter_mut().zip(value) {
                    *sum = multiply_add::<S, PAIRS>(simd, *sum, weight, value);
                }
            }
        }
        for (row, sums) in sums.into_iter().enumerate() {
            for (vector, sum) in sums.into_iter().enumerate() {
                simd.store(target.add(row * padded_dim + vector * S::LANES), sum);
            }
        }
    }
}
