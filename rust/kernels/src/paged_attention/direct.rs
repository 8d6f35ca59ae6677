//! Both products of a whole tile for the few query vectors of a decode, without packing: keys are transposed and values
//! interleaved in registers, just before they are used. The cost of packing has few to be shared by then: without it a step
//! of eight rows after 256 tokens took 8.1 to 9.9 ms instead of 8.9 to 12.4. Chains of additions are those of [`super::micro`], in every bit.
//! O(vectors x tokens x head size). For bf16 pairs in vectors of sixteen lanes.
#![expect(unsafe_code, reason = "vector loads on raw pointers of the region")]

use super::TILE_TOKENS;
use super::micro::Accumulate;
use super::pack::{TILE_RUNS, TileRows};
use crate::element::Bf16;
use crate::kv_format::Stored;
use crate::kv_region::RUN_TOKENS;
use crate::simd::Simd;

/// Query vectors at most: sums of so many and what is multiplied stay in 32 registers.
pub(super) const MAX_VECTORS: usize = 4;
/// Head sizes are multiples of this.
pub(super) const DIMS: usize = 32;
const LANES: usize = 16;
/// Vectors of tokens in a tile.
const GROUPS: usize = TILE_TOKENS / LANES;
/// Vectors of dimensions that are summed at once, at most.
const MAX_SUMS: usize = 4;

/// `scores[r][t]` for all tokens of a tile; see [`super::micro::scores`].
///
/// # Safety
/// `tile` wants all its tokens, `queries` holds `ROWS` rows of half the head size words, `scores` `ROWS x TILE_TOKENS`.
#[inline(always)]
pub(super) unsafe fn scores<S: Simd, K: Stored, const ROWS: usize>(
    simd: S,
    units: usize,
    queries: *const u32,
    scores: *mut f32,
    tile: &TileRows<K>,
    next: &TileRows<K>,
) {
    assert!(S::LANES == LANES);
    let mut sums = [[simd.splat(0.0); GROUPS]; ROWS];
    let turns = units / 4;
    // SAFETY: the caller's promise; four rows of a run follow each other, `units` words each.
    unsafe {
        for turn in 0..turns {
            for run in TILE_RUNS * turn / turns..TILE_RUNS * (turn + 1) / turns {
                next.prefetch_keys(simd, run);
            }
            for group in 0..GROUPS {
                let bases = core::array::from_fn(|base| {
                    let token = group * LANES + 4 * base;
                    let run = tile.run(token / RUN_TOKENS).0.cast::<u32>();
                    run.wrapping_add(token % RUN_TOKENS * units + 4 * turn)
                });
                for (unit, keys) in simd.transposed_units(bases, units).into_iter().enumerate() {
                    for (row, sums) in sums.iter_mut().enumerate() {
                        let query = simd.splat_u32(*queries.add(row * units + 4 * turn + unit));
                        sums[group] = simd.dot_bf16(sums[group], query, keys);
                    }
                }
            }
        }
        for (row, sums) in sums.into_iter().enumerate() {
            for (group, sum) in sums.into_iter().enumerate() {
                simd.store(scores.add(row * TILE_TOKENS + group * LANES), sum);
            }
        }
    }
}

/// Adds the weighted values of a tile to the sums of `ROWS` rows; see [`Accumulate::full_rows`].
///
/// # Safety
/// As [`Accumulate::full_rows`], but for the values, which are the tile's; it wants all its tokens.
#[inline(always)]
pub(super) unsafe fn accumulate<S: Simd, K: Stored, const ROWS: usize>(
    simd: S,
    operands: Accumulate,
    head_dim: usize,
    tile: &TileRows<K>,
    next: &TileRows<K>,
) {
    let mut dim = 0;
    // SAFETY: the caller's promise.
    unsafe {
        while dim < head_dim {
            if head_dim - dim < MAX_SUMS * LANES {
                sum_block::<S, K, ROWS, 2>(simd, operands, head_dim, dim, tile, next);
                dim += 2 * LANES;
            } else {
                sum_block::<S, K, ROWS, MAX_SUMS>(simd, operands, head_dim, dim, tile, next);
                dim += MAX_SUMS * LANES;
            }
        }
    }
}

/// # Safety
/// As [`accumulate`], for `VECTORS` vectors of dimensions from `dim`.
#[inline(always)]
unsafe fn sum_block<S: Simd, K: Stored, const ROWS: usize, const VECTORS: usize>(
    simd: S,
    operands: Accumulate,
    head_dim: usize,
    dim: usize,
    tile: &TileRows<K>,
    next: &TileRows<K>,
) {
    let mut sums = [[simd.splat(0.0); VECTORS]; ROWS];
    // SAFETY: the caller's promise; the rows of a run follow each other.
    unsafe {
        let target = operands.sums.add(dim);
        for (row, sums) in sums.iter_mut().enumerate() {
            let factor = simd.splat(*operands.factors.add(row));
            for (vector, sum) in sums.iter_mut().enumerate() {
                *sum = simd.mul(simd.load(target.add(row * operands.padded_dim + vector * LANES)), factor);
            }
        }
        for run in 0..TILE_RUNS {
            if dim == 0 {
                next.prefetch_values(simd, run);
            }
            let mut even = tile.run(run).1.cast::<Bf16>().wrapping_add(dim);
            for unit in run * RUN_TOKENS / 2..(run + 1) * RUN_TOKENS / 2 {
                let odd = even.wrapping_add(head_dim);
                let mut values = [simd.splat_u32(0); VECTORS];
                for (part, values) in values.chunks_exact_mut(2).enumerate() {
                    let first = part * DIMS;
                    let (low, high) = simd.interleave_bf16(even.add(first), odd.add(first), DIMS);
                    (values[0], values[1]) = (low, high);
                }
                for (row, sums) in sums.iter_mut().enumerate() {
                    let weight = simd.splat_u32(*operands.weights.add(row * TILE_TOKENS + unit));
                    for (sum, value) in sums.iter_mut().zip(values) {
                        *sum = simd.dot_bf16(*sum, weight, value);
                    }
                }
                even = odd.wrapping_add(head_dim);
            }
        }
        for (row, sums) in sums.into_iter().enumerate() {
            for (vector, sum) in sums.into_iter().enumerate() {
                simd.store(target.add(row * operands.padded_dim + vector * LANES), sum);
            }
        }
    }
}
