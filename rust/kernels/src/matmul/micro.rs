//! The register-blocked product of some rows with one panel of packed weights. Each output is one chain of additions over
//! the units of its inputs in order, whatever the number of rows beside it, so blocking never changes bits.
//! A block of 12 rows and 32 outputs keeps 24 sums in registers where vectors have sixteen lanes. Knows nothing of formats:
//! an [`Arithmetic`] says what a word means.
#![expect(unsafe_code, reason = "micro-kernels on packed memory")]

use super::panels::PANEL;
use crate::element::Element;
use crate::simd::{Simd, load_element, load_element_partial, store_element, store_element_partial};

/// What words mean and how their products are added. Methods are `#[inline(always)]`, like all generic code.
pub(super) trait Arithmetic: Copy {
    /// The sum of a row before its first unit.
    fn begin<S: Simd>(self, simd: S, row: usize) -> S::U32;
    /// Adds the products of one unit.
    fn add<S: Simd>(self, simd: S, sum: S::U32, input: S::U32, weights: S::U32) -> S::U32;
    /// The result of a row's sums for the outputs from `output` of the panel on.
    fn finish<S: Simd>(self, simd: S, row: usize, output: usize, sum: S::U32) -> S::F32;
}

/// What a product of some rows with one panel reads and writes.
#[derive(Clone, Copy)]
pub(super) struct PanelProduct<T, A> {
    pub(super) arithmetic: A,
    /// `rows` rows of `units` words, `input_stride` words apart.
    pub(super) input: *const u32,
    pub(super) input_stride: usize,
    pub(super) rows: usize,
    /// `units x PANEL` words.
    pub(super) panel: *const u32,
    pub(super) units: usize,
    /// One value per output, or null.
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
            $($count => block::<S, T, A, $count, $vectors>($simd, $product, $first),)*
            _ => unreachable!("blocks have at most so many rows"),
        }
    };
}

/// Rows of a block, so that its sums stay in registers.
const fn max_block_rows(lanes: usize) -> usize {
    if lanes == 16 { 12 } else { 3 }
}

impl<T: Element, A: Arithmetic> PanelProduct<T, A> {
    /// # Safety
    /// The memory is as the fields say.
    #[inline(always)]
    pub(super) unsafe fn run<S: Simd>(self, simd: S) {
        // As many rows in each block as possible: 13 are 7 and 6, not 12 and a panel read again for one.
        let blocks = self.rows.div_ceil(max_block_rows(S::LANES));
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

/// # Safety
/// As [`PanelProduct::run`], for `ROWS` rows from `first` on.
#[inline(always)]
unsafe fn block<S: Simd, T: Element, A: Arithmetic, const ROWS: usize, const VECTORS: usize>(
    simd: S,
    product: PanelProduct<T, A>,
    first: usize,
) {
    assert!(VECTORS * S::LANES == PANEL);
    let mut sums = [[simd.splat_u32(0); VECTORS]; ROWS];
    for (row, sums) in sums.iter_mut().enumerate() {
        *sums = [product.arithmetic.begin(simd, first + row); VECTORS];
    }
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
                let word = simd.splat_u32(input.add(row * product.input_stride + unit).read_unaligned());
                for (sum, weights) in sums.iter_mut().zip(weights) {
                    *sum = product.arithmetic.add(simd, *sum, word, weights);
                }
            }
        }
        for (row, sums) in sums.into_iter().enumerate() {
            let output = product.output.add((first + row) * product.output_stride);
            for (vector, sum) in sums.into_iter().enumerate() {
                let at = vector * S::LANES;
                let value = product.arithmetic.finish(simd, first + row, at, sum);
                store(simd, product, output, at, value);
            }
        }
    }
}

/// Adds the bias and stores one vector of outputs, as many as there are.
///
/// # Safety
/// As [`PanelProduct::run`]; `output` is a row.
#[inline(always)]
unsafe fn store<S: Simd, T: Element, A: Arithmetic>(
    simd: S,
    product: PanelProduct<T, A>,
    output: *mut T,
    at: usize,
    value: S::F32,
) {
    let count = product.outputs.saturating_sub(at).min(S::LANES);
    let has_bias = !product.bias.is_null();
    // SAFETY: the caller's promise; `count` elements remain.
    unsafe {
        if count == S::LANES {
            let value = if has_bias { simd.add(value, load_element(simd, product.bias.add(at))) } else { value };
            store_element(simd, output.add(at), value);
        } else if count > 0 {
            let value =
                if has_bias { simd.add(value, load_element_partial(simd, product.bias.add(at), count)) } else { value };
            store_element_partial(simd, output.add(at), value, count);
        }
    }
}
