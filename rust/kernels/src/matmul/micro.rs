//! The register-blocked product of a tile of rows with one panel of packed weights. Each output is one chain of additions
//! over the units of its inputs in order, whatever the number of rows beside it, so tiles never change bits.
//! A tile of 12 rows and 32 outputs keeps 24 sums in registers where vectors have sixteen lanes. Knows nothing of formats:
//! an [`Arithmetic`] says what words mean.
#![expect(unsafe_code, reason = "micro-kernels on packed memory")]

use super::panels::PANEL;
use crate::element::Element;
use crate::simd::{Simd, load_element, load_element_partial, store_element, store_element_partial};

/// Products of so few rows wait for memory, those of more for arithmetic.
const MAX_FETCHING_ROWS: usize = 4;
/// How far ahead weights are fetched: a step of one row with int8 took 5.2 instead of 5.5 ms; half as far was as good, and
/// four times as far took 5.8.
const FETCH_WORDS: usize = 512;
const CACHE_LINE_BYTES: usize = 64;

/// The words of a tile and a panel.
#[derive(Clone, Copy)]
pub(super) struct TileWords {
    /// First row of the tile.
    pub(super) first_row: usize,
    /// `units x rows` words.
    pub(super) input: *const u32,
    /// `units x PANEL` words.
    pub(super) panel: *const u32,
    /// Of the panel.
    pub(super) units: usize,
}

/// What words mean and how their products are added. Methods are `#[inline(always)]`, like all generic code.
pub(super) trait Arithmetic: Copy {
    /// Rows of a tile, at most, so that its sums stay in registers.
    fn max_rows(lanes: usize) -> usize;

    /// The results of a tile before the bias.
    ///
    /// # Safety
    /// The memory is as the fields say.
    unsafe fn sums<S: Simd, const ROWS: usize, const VECTORS: usize>(
        self,
        simd: S,
        words: TileWords,
    ) -> [[S::F32; VECTORS]; ROWS];

    /// Computes and stores a tile.
    ///
    /// # Safety
    /// The memory is as the fields say, and the tile has at most `max_rows` rows.
    unsafe fn run<S: Simd, T: Element>(self, simd: S, product: TileProduct<T>);
}

/// What a product of a tile with one panel reads and writes.
#[derive(Clone, Copy)]
pub(super) struct TileProduct<T> {
    pub(super) words: TileWords,
    pub(super) rows: usize,
    /// One value per output, or null.
    pub(super) bias: *const T,
    /// `rows` rows, `output_stride` elements apart, of `outputs <= PANEL` elements.
    pub(super) output: *mut T,
    pub(super) output_stride: usize,
    pub(super) outputs: usize,
}

/// Calls [`block`] for the number of rows.
macro_rules! block_of {
    ($rows:expr, [$($count:literal),*], $vectors:literal, $arithmetic:expr, $simd:expr, $product:expr) => {
        match $rows {
            $($count => crate::matmul::micro::block::<S, T, Self, $count, $vectors>($simd, $arithmetic, $product),)*
            _ => unreachable!("tiles have at most so many rows"),
        }
    };
}

pub(super) use block_of;

/// # Safety
/// As [`Arithmetic::run`], for a tile of `ROWS` rows.
#[inline(always)]
pub(super) unsafe fn block<S: Simd, T: Element, A: Arithmetic, const ROWS: usize, const VECTORS: usize>(
    simd: S,
    arithmetic: A,
    product: TileProduct<T>,
) {
    assert!(VECTORS * S::LANES == PANEL);
    // SAFETY: the caller's promise.
    unsafe {
        let sums = arithmetic.sums::<S, ROWS, VECTORS>(simd, product.words);
        for (row, sums) in sums.into_iter().enumerate() {
            let output = product.output.add(row * product.output_stride);
            for (vector, value) in sums.into_iter().enumerate() {
                store(simd, product, output, vector * S::LANES, value);
            }
        }
    }
}

/// Adds the bias and stores one vector of outputs, as many as there are.
///
/// # Safety
/// As [`Arithmetic::run`]; `output` is a row.
#[inline(always)]
unsafe fn store<S: Simd, T: Element>(simd: S, product: TileProduct<T>, output: *mut T, at: usize, value: S::F32) {
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

/// Arithmetic of formats whose units are one word of a row and one word per output, added up by themselves.
pub(super) trait WordArithmetic: Copy {
    /// The sum of a row before its first unit.
    fn begin<S: Simd>(self, simd: S, row: usize) -> S::U32;
    /// Adds the products of one unit.
    fn add<S: Simd>(self, simd: S, sum: S::U32, input: S::U32, weights: S::U32) -> S::U32;
    /// The result of a row's sums for the outputs from `output` of the panel on.
    fn finish<S: Simd>(self, simd: S, row: usize, output: usize, sum: S::U32) -> S::F32;
}

/// See [`WordArithmetic`].
#[derive(Clone, Copy)]
pub(super) struct Words<A>(pub(super) A);

impl<A: WordArithmetic> Arithmetic for Words<A> {
    fn max_rows(lanes: usize) -> usize {
        if lanes == 16 { 12 } else { 3 }
    }

    #[inline(always)]
    unsafe fn sums<S: Simd, const ROWS: usize, const VECTORS: usize>(
        self,
        simd: S,
        words: TileWords,
    ) -> [[S::F32; VECTORS]; ROWS] {
        let mut sums = [[simd.splat_u32(0); VECTORS]; ROWS];
        for (row, sums) in sums.iter_mut().enumerate() {
            *sums = [self.0.begin(simd, words.first_row + row); VECTORS];
        }
        let (mut source, mut input) = (words.panel, words.input);
        for _ in 0..words.units {
            let mut weights = [simd.splat_u32(0); VECTORS];
            // SAFETY: the caller's promise: a unit has `PANEL` words here and `ROWS` there.
            unsafe {
                for (vector, weights) in weights.iter_mut().enumerate() {
                    *weights = simd.load_u32(source.add(vector * S::LANES));
                }
                if ROWS <= MAX_FETCHING_ROWS {
                    let far = source.wrapping_add(FETCH_WORDS).cast::<u8>();
                    simd.prefetch(far);
                    simd.prefetch(far.wrapping_add(CACHE_LINE_BYTES));
                }
                for (row, sums) in sums.iter_mut().enumerate() {
                    let word = simd.splat_u32(*input.add(row));
                    for (sum, weights) in sums.iter_mut().zip(weights) {
                        *sum = self.0.add(simd, *sum, word, weights);
                    }
                }
                (source, input) = (source.add(PANEL), input.add(ROWS));
            }
        }
        let mut results = [[simd.splat(0.0); VECTORS]; ROWS];
        for (row, (results, sums)) in results.iter_mut().zip(sums).enumerate() {
            for (vector, (result, sum)) in results.iter_mut().zip(sums).enumerate() {
                *result = self.0.finish(simd, words.first_row + row, vector * S::LANES, sum);
            }
        }
        results
    }

    #[inline(always)]
    unsafe fn run<S: Simd, T: Element>(self, simd: S, product: TileProduct<T>) {
        // SAFETY: the caller's promise.
        unsafe {
            if S::LANES == 16 {
                block_of!(product.rows, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12], 2, self, simd, product);
            } else {
                block_of!(product.rows, [1, 2, 3], 4, self, simd, product);
            }
        }
    }
}
