//! The register-blocked product of some rows with one panel of packed weights. Each output is one chain of multiply-adds
//! over the units of its inputs in order, whatever the number of rows beside it, so blocking never changes bits.
//! A block of 12 rows and 32 outputs keeps 24 sums in registers where vectors have sixteen lanes.
#![expect(unsafe_code, reason = "micro-kernels on packed memory")]

use super::packed::PANEL;
use crate::element::Element;
use crate::simd::{Simd, load_element, load_element_partial, store_element, store_element_partial};

/// What a product of some rows with one panel reads and writes.
#[derive(Clone, Copy)]
pub(super) struct PanelProduct<T> {
    /// `rows` rows, `input_stride` elements apart, each padded to whole units.
    pub(super) input: *const T,
    pub(super) input_stride: usize,
    pub(super) rows: usize,
    /// `units x PANEL` words.
    pub(super) panel: *const u32,
    pub(super) units: usize,
    /// One value per output of the panel, or null.
    pub(super) bias: *const T,
    /// `rows` rows, `output_stride` elements apart, of `outputs <= PANEL` elements.
    pub(super) output: *mut T,
    pub(super) output_stride: usize,
    pub(super) outputs: usize,
}

/// Calls a block for the number of rows.
macro_rules! block_of {
    ($rows:expr, [$($count:literal),*], $vectors:literal, $simd:expr, $product:expr, $first:expr) => {
        match $rows {
            $($count => block::<S, T, $count, $vectors>($simd, $product, $first),)*
            _ => unreachable!("blocks have at most so many rows"),
        }
    };
}

impl<T: Element> PanelProduct<T> {
    /// Rows of a block, so that its sums stay in registers.
    const fn max_block_rows(lanes: usize) -> usize {
        if lanes == 16 { 12 } else { 3 }
    }

    /// # Safety
    /// The memory is as the fields say.
    #[inline(always)]
    pub(super) unsafe fn run<S: Simd>(self, simd: S) {
        // As many rows in each block as possible: 13 are 7 and 6, not 12 and a panel read again for one.
        let blocks = self.rows.div_ceil(Self::max_block_rows(S::LANES));
        let mut first = 0;
        for index in 0..blocks {
            let rows = (self.rows - first).div_ceil(blocks - index);
            // SAFETY: `first + rows` lies within `self.rows`.
            unsafe {
                if S::LANES == 16 {
                    block_of!(rows, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12], 2, simd, self, first);
                } else {
                    block_of!(rows, [1, 2, 3], 4, simd, self, first);
                }
            }
            first += rows;
        }
    }
}

/// Adds the products of one unit.
#[inline(always)]
fn multiply_add<S: Simd, T: Element>(simd: S, sum: S::F32, input: S::U32, weight: S::U32) -> S::F32 {
    if !T::IS_BF16 {
        return simd.mul_add(simd.bits_to_f32(input), simd.bits_to_f32(weight), sum);
    }
    if S::BF16_DOT {
        return simd.dot_bf16(sum, input, weight);
    }
    // The lower half of a word is the earlier input.
    let low = |word| simd.bits_to_f32(simd.shift_left::<16>(word));
    let high = |word| simd.bits_to_f32(simd.and_u32(word, simd.splat_u32(0xffff_0000)));
    simd.mul_add(high(input), high(weight), simd.mul_add(low(input), low(weight), sum))
}

/// # Safety
/// As [`PanelProduct::run`], for `ROWS` rows from `first` on.
#[inline(always)]
unsafe fn block<S: Simd, T: Element, const ROWS: usize, const VECTORS: usize>(
    simd: S,
    product: PanelProduct<T>,
    first: usize,
) {
    debug_assert_eq!(VECTORS * S::LANES, PANEL);
    let mut sums = [[simd.splat(0.0); VECTORS]; ROWS];
    // SAFETY: the caller's promise.
    unsafe {
        let input = product.input.add(first * product.input_stride);
        let mut source = product.panel;
        for unit in 0..product.units {
            let mut weights = [simd.splat_u32(0); VECTORS];
            for (vector, weights) in weights.iter_mut().enumerate() {
                *weights = simd.load_u32(source.add(vector * S::LANES));
            }
            source = source.add(PANEL);
            for (row, sums) in sums.iter_mut().enumerate() {
                let word = input.add(row * product.input_stride).cast::<u32>().add(unit).read_unaligned();
                let word = simd.splat_u32(word);
                for (sum, weight) in sums.iter_mut().zip(weights) {
                    *sum = multiply_add::<S, T>(simd, *sum, word, weight);
                }
            }
        }
        for (row, sums) in sums.into_iter().enumerate() {
            let output = product.output.add((first + row) * product.output_stride);
            for (vector, sum) in sums.into_iter().enumerate() {
                store::<S, T>(simd, product, output, vector * S::LANES, sum);
            }
        }
    }
}

/// Adds the bias and stores one vector of outputs, as many as there are.
///
/// # Safety
/// As [`PanelProduct::run`]; `output` is a row.
#[inline(always)]
unsafe fn store<S: Simd, T: Element>(simd: S, product: PanelProduct<T>, output: *mut T, at: usize, sum: S::F32) {
    let count = product.outputs.saturating_sub(at).min(S::LANES);
    let has_bias = !product.bias.is_null();
    // SAFETY: the caller's promise; `count` elements remain.
    unsafe {
        if count == S::LANES {
            let sum = if has_bias { simd.add(sum, load_element(simd, product.bias.add(at))) } else { sum };
            store_element(simd, output.add(at), sum);
        } else if count > 0 {
            let bias = if has_bias { load_element_partial(simd, product.bias.add(at), count) } else { simd.splat(0.0) };
            let sum = if has_bias { simd.add(sum, bias) } else { sum };
            store_element_partial(simd, output.add(at), sum, count);
        }
    }
}
