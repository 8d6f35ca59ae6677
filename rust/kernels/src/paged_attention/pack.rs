//! Brings a tile's keys and values from the paged region into the layout of the micro-kernels.
//! Keys are transposed to `[unit][token]`, values become `[token unit][dim]` with bf16 tokens interleaved in pairs, so
//! that lanes are tokens (scores) or dimensions (sums) and no sum across lanes is ever needed. O(tokens x head size);
//! the cost is shared by all query vectors of the tile. Tokens outside the wanted range are never read.
#![expect(unsafe_code, reason = "vector loads and stores on raw pointers")]

use super::TILE_TOKENS;
use crate::element::{Bf16, Element};
use crate::simd::{Simd, load_element, load_element_partial};
use core::ops::Range;

/// A row of zeros as long as the longest head, for tokens outside the wanted range.
static ZEROS: [u32; 256] = [0; 256];

/// Where the key of every wanted token of a tile lies; the value is `to_value` elements further.
pub(super) struct TileRows<T> {
    pub(super) keys: [*const T; TILE_TOKENS],
    pub(super) to_value: usize,
    pub(super) head_dim: usize,
    /// Tokens of the tile that are wanted.
    pub(super) tokens: Range<usize>,
}

impl<T: Element> TileRows<T> {
    #[inline(always)]
    fn key(&self, token: usize) -> *const T {
        if self.tokens.contains(&token) { self.keys[token] } else { ZEROS.as_ptr().cast() }
    }

    #[inline(always)]
    fn value(&self, token: usize) -> *const T {
        if self.tokens.contains(&token) {
            // SAFETY: the value lies inside the region, where the plan found the block.
            unsafe { self.keys[token].add(self.to_value) }
        } else {
            ZEROS.as_ptr().cast()
        }
    }

    /// Hints that this tile will be packed soon.
    #[inline(always)]
    pub(super) fn prefetch<S: Simd>(&self, simd: S) {
        let lines = (self.head_dim * size_of::<T>()).div_ceil(64);
        for token in self.tokens.clone() {
            for line in 0..lines {
                simd.prefetch(self.key(token).cast::<u8>().wrapping_add(64 * line));
                simd.prefetch(self.value(token).cast::<u8>().wrapping_add(64 * line));
            }
        }
    }

    /// Writes `keys[unit * TILE_TOKENS + token]` for the wanted tokens, rounded out to whole vectors of tokens.
    ///
    /// # Safety
    /// `keys` holds `units x TILE_TOKENS` words; `widened` holds `LANES x head_dim` words.
    #[inline(always)]
    pub(super) unsafe fn pack_keys<S: Simd, const PAIRS: bool>(&self, simd: S, keys: *mut u32, widened: *mut f32) {
        let units = if PAIRS { self.head_dim / 2 } else { self.head_dim };
        let mut group = self.tokens.start / S::LANES * S::LANES;
        while group < self.tokens.end {
            let mut rows = [ZEROS.as_ptr(); 16];
            for (lane, row) in rows.iter_mut().enumerate().take(S::LANES) {
                *row = self.key(group + lane).cast();
            }
            // SAFETY: every row holds `units` words once widened; the target is the caller's promise.
            unsafe {
                if T::IS_BF16 && !PAIRS {
                    for (lane, row) in rows.iter_mut().enumerate().take(S::LANES) {
                        let target = widened.add(lane * self.head_dim);
                        widen_row(simd, (*row).cast::<T>(), target, self.head_dim);
                        *row = target.cast();
                    }
                }
                for unit in (0..units).step_by(4) {
                    simd.transpose_units(rows.as_ptr(), unit, keys.add(unit * TILE_TOKENS + group), TILE_TOKENS);
                }
            }
            group += S::LANES;
        }
    }

    /// Writes `values[token unit * padded_dim + dim]` for the wanted tokens; dimensions past the head are zero.
    ///
    /// # Safety
    /// `values` holds `token units x padded_dim` words, `padded_dim` being `head_dim` rounded up to whole vectors.
    #[inline(always)]
    pub(super) unsafe fn pack_values<S: Simd, const PAIRS: bool>(&self, simd: S, values: *mut u32, padded_dim: usize) {
        // SAFETY: reads stay within `head_dim`, writes within `padded_dim`.
        unsafe {
            if PAIRS {
                for unit in self.tokens.start / 2..self.tokens.end.div_ceil(2) {
                    let even = self.value(2 * unit).cast::<Bf16>();
                    let odd = self.value(2 * unit + 1).cast::<Bf16>();
                    let target = values.add(unit * padded_dim);
                    for dim in (0..self.head_dim).step_by(2 * S::LANES) {
                        let count = (self.head_dim - dim).min(2 * S::LANES);
                        let (low, high) = simd.interleave_bf16(even.add(dim), odd.add(dim), count);
                        simd.store_u32(target.add(dim), low);
                        if dim + S::LANES < padded_dim {
                            simd.store_u32(target.add(dim + S::LANES), high);
                        }
                    }
                }
            } else {
                for token in self.tokens.clone() {
                    widen_row(simd, self.value(token), values.add(token * padded_dim).cast(), self.head_dim);
                }
            }
        }
    }
}

/// Copies one head's row as f32, padding it with zeros to a whole vector where `target` has room for that.
///
/// # Safety
/// `source` holds `head_dim` elements, `target` `head_dim` rounded up to whole vectors.
#[inline(always)]
unsafe fn widen_row<S: Simd, T: Element>(simd: S, source: *const T, target: *mut f32, head_dim: usize) {
    let mut dim = 0;
    // SAFETY: the caller's promise.
    unsafe {
        while dim + S::LANES <= head_dim {
            simd.store(target.add(dim), load_element(simd, source.add(dim)));
            dim += S::LANES;
        }
        if dim < head_dim {
            simd.store(target.add(dim), load_element_partial(simd, source.add(dim), head_dim - dim));
        }
    }
}

/// Writes one query vector as units: f32, or pairs of bf16.
///
/// # Safety
/// `source` holds `head_dim` elements; `target` holds as many words (half for pairs) rounded up to a whole vector.
#[inline(always)]
pub(super) unsafe fn pack_query<S: Simd, T: Element, const PAIRS: bool>(
    simd: S,
    source: *const T,
    target: *mut u32,
    head_dim: usize,
) {
    // SAFETY: the caller's promise; pairs are the elements' own bytes.
    unsafe {
        if PAIRS {
            core::ptr::copy_nonoverlapping(source.cast::<Bf16>(), target.cast::<Bf16>(), head_dim);
        } else {
            widen_row(simd, source, target.cast(), head_dim);
        }
    }
}
