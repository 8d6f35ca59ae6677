//! Products with weights in f32 or bf16. Sums are in f32, rounded once; where a processor multiplies pairs of bf16, pairs
//! are added as it adds them. `2 rows x outputs x inputs` operations.
#![expect(unsafe_code, reason = "rows are read as words and written on several threads")]

use super::micro::{Arithmetic, WordArithmetic, Words};
use super::panels::{PackError, Panels};
use super::sweep::{Sweep, rows_of};
use super::tiles::{MatmulScratch, Packing, RowFormat, lanes};
use crate::dispatch::Level;
use crate::element::Element;
use crate::error::{KernelError, require_length};
use crate::pool::Pool;
use crate::row_source::RowSource;
use crate::simd::Simd;
use core::marker::PhantomData;
use std::io;

/// A weight `[outputs, inputs]`, packed.
#[derive(Debug)]
pub struct PackedWeights<T> {
    panels: Panels,
    element: PhantomData<T>,
}

impl<T: Element> PackedWeights<T> {
    /// Inputs of a word.
    const UNIT: usize = 4 / size_of::<T>();

    /// Packs `weights`, `outputs x inputs`, row after row.
    ///
    /// # Errors
    /// A shape of zero or another length, or no memory.
    pub fn pack(pool: &Pool, weights: &[T], outputs: usize, inputs: usize) -> Result<Self, PackError> {
        require_length("weights", outputs * inputs, weights.len())?;
        Self::read(pool, outputs, inputs, |first, rows| {
            rows.copy_from_slice(&weights[first * inputs..][..rows.len()]);
            Ok(())
        })
    }

    /// Packs what `read(first, rows)` gives: outputs from `first` on, as many whole rows of `inputs` as there is room for.
    ///
    /// # Errors
    /// A shape of zero, no memory, or what `read` says.
    pub fn read(
        pool: &Pool,
        outputs: usize,
        inputs: usize,
        read: impl Fn(usize, &mut [T]) -> io::Result<()> + Sync,
    ) -> Result<Self, PackError> {
        let panels = Panels::pack(pool, outputs, inputs, Self::UNIT, |first, count, words| {
            let mut rows = vec![T::default(); count * inputs];
            read(first, &mut rows)?;
            let units = inputs.div_ceil(Self::UNIT);
            for (row, words) in rows.chunks_exact(inputs).zip(words.chunks_exact_mut(units)) {
                for (values, word) in row.chunks(Self::UNIT).zip(words) {
                    *word = Self::word(values);
                }
            }
            Ok(())
        })?;
        Ok(Self { panels, element: PhantomData })
    }

    /// Elements of one word; the first is in its lower half.
    #[inline(always)]
    fn word(values: &[T]) -> u32 {
        let first = values[0].to_f32().to_bits();
        if T::IS_BF16 { first >> 16 | values.get(1).map_or(0, |value| value.to_f32().to_bits()) } else { first }
    }

    /// Copies rows of the weight, as a table: `out[i]` is row `ids[i]`, `ids.len() x inputs`.
    ///
    /// # Errors
    /// An id that the table does not have, or another length; nothing has been written then.
    pub fn gather(&self, pool: &Pool, ids: &[i32], out: &mut [T]) -> Result<(), KernelError> {
        // Exact: a half of a word is a number of this format.
        let number = |half: u32| T::from_f32(f32::from_bits(half));
        if T::IS_BF16 {
            self.panels.gather(pool, ids, out, |_, word| [number(word << 16), number(word & 0xffff_0000)])
        } else {
            self.panels.gather(pool, ids, out, |_, word| [number(word)])
        }
    }

    /// Outputs, without padding.
    pub fn outputs(&self) -> usize {
        self.panels.outputs()
    }

    /// Inputs, without padding.
    pub fn inputs(&self) -> usize {
        self.panels.inputs()
    }

    /// Memory that it holds.
    pub fn bytes(&self) -> usize {
        self.panels.bytes()
    }
}

/// `output = input weights^T + bias` for whole rows of `weights.inputs()` elements. `output` has rows of
/// `weights.outputs()` elements, `bias` one such row.
///
/// # Errors
/// A length that is no whole number of rows.
pub fn multiply<T: Element>(
    pool: &Pool,
    level: Level,
    scratch: &mut MatmulScratch,
    input: &(impl RowSource<T> + ?Sized),
    weights: &PackedWeights<T>,
    bias: Option<&[T]>,
    output: &mut [T],
) -> Result<(), KernelError> {
    let panels = &weights.panels;
    let rows = rows_of(input, panels, bias, output)?;
    let max_rows = Words::<Floats<T>>::max_rows(lanes(level));
    let packing = Packing { rows, width: panels.inputs(), max_rows, units: panels.units(), sums: 0 };
    scratch.fill(pool, level, packing, input, &AsTheyAre)?;
    Sweep { rows: scratch, panels, bias, output }.run(pool, level, |_| Words(Floats::<T>(PhantomData)))
}

/// Rows in the format of the weights.
struct AsTheyAre;

impl<T: Element> RowFormat<T> for AsTheyAre {
    fn convert(&self, _: Level, row: &[T], line: &mut [u32], _: &mut [i32]) -> f32 {
        assert!(line.len() * 4 >= size_of_val(row));
        if let Some(last) = line.last_mut() {
            *last = 0;
        }
        // SAFETY: the line has room, as asserted; elements are plain numbers whose bytes are those of words.
        unsafe {
            core::ptr::copy_nonoverlapping(row.as_ptr().cast::<u8>(), line.as_mut_ptr().cast(), size_of_val(row));
        };
        0.0
    }
}

/// Sums of f32 products.
struct Floats<T>(PhantomData<T>);

impl<T> Clone for Floats<T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Floats<T> {}

impl<T: Element> WordArithmetic for Floats<T> {
    #[inline(always)]
    fn begin<S: Simd>(self, simd: S, _: usize) -> S::U32 {
        simd.splat_u32(0)
    }

    #[inline(always)]
    fn add<S: Simd>(self, simd: S, sum: S::U32, input: S::U32, weights: S::U32) -> S::U32 {
        let sum = simd.bits_to_f32(sum);
        let sum = if !T::IS_BF16 {
            simd.mul_add(simd.bits_to_f32(input), simd.bits_to_f32(weights), sum)
        } else if S::BF16_DOT {
            simd.dot_bf16(sum, input, weights)
        } else {
            // The lower half of a word is the earlier input.
            let sum = simd.mul_add(low(simd, input), low(simd, weights), sum);
            simd.mul_add(high(simd, input), high(simd, weights), sum)
        };
        simd.f32_to_bits(sum)
    }

    #[inline(always)]
    fn finish<S: Simd>(self, simd: S, _: usize, _: usize, sum: S::U32) -> S::F32 {
        simd.bits_to_f32(sum)
    }
}

#[inline(always)]
fn low<S: Simd>(simd: S, word: S::U32) -> S::F32 {
    simd.bits_to_f32(simd.shift_left::<16>(word))
}

#[inline(always)]
fn high<S: Simd>(simd: S, word: S::U32) -> S::F32 {
    simd.bits_to_f32(simd.and_u32(word, simd.splat_u32(0xffff_0000)))
}
