//! Products with weights in f32 or bf16. Sums are in f32, rounded once; where a processor multiplies pairs of bf16, pairs
//! are added as it adds them. `2 rows x outputs x inputs` operations.
#![expect(unsafe_code, reason = "rows are read as words")]

use super::micro::Arithmetic;
use super::panels::{PackError, Panels};
use super::sweep::Sweep;
use crate::dispatch::Level;
use crate::element::Element;
use crate::error::{KernelError, require_length};
use crate::pool::Pool;
use crate::simd::Simd;
use core::marker::PhantomData;

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
        let panels = Panels::pack(pool, outputs, inputs, Self::UNIT, |output, unit| {
            let row = &weights[output * inputs..][..inputs];
            let mut values = [T::default(); 2];
            let given = &row[unit * Self::UNIT..((unit + 1) * Self::UNIT).min(inputs)];
            values[..given.len()].copy_from_slice(given);
            if T::IS_BF16 {
                values[0].to_f32().to_bits() >> 16 | values[1].to_f32().to_bits()
            } else {
                values[0].to_f32().to_bits()
            }
        })?;
        Ok(Self { panels, element: PhantomData })
    }

    /// Outputs, without padding.
    pub fn outputs(&self) -> usize {
        self.panels.outputs()
    }

    /// Inputs, without padding.
    pub fn inputs(&self) -> usize {
        self.panels.inputs()
    }

    /// Inputs with the padding that rows must have, too.
    pub fn padded_inputs(&self) -> usize {
        self.panels.units() * Self::UNIT
    }

    /// Memory that it holds.
    pub fn bytes(&self) -> usize {
        self.panels.bytes()
    }
}

/// `output = input weights^T + bias` for rows of `weights.padded_inputs()` elements, of which those past `inputs` are
/// zero. `output` has rows of `weights.outputs()` elements, `bias` one such row.
///
/// # Errors
/// A length that is no whole number of rows.
pub fn multiply<T: Element>(
    pool: &Pool,
    level: Level,
    input: &[T],
    weights: &PackedWeights<T>,
    bias: Option<&[T]>,
    output: &mut [T],
) -> Result<(), KernelError> {
    let stride = weights.padded_inputs();
    let rows = input.len() / stride;
    require_length("input", rows * stride, input.len())?;
    let words = rows * weights.panels.units();
    assert!(input.as_ptr().cast::<u32>().is_aligned() || words == 0, "rows begin with a word");
    // SAFETY: the rows hold so many words, aligned by the line above (an empty slice is), and every word is a number.
    let input = unsafe { core::slice::from_raw_parts(input.as_ptr().cast::<u32>(), words) };
    let sweep = Sweep { input, rows, panels: &weights.panels, bias, output };
    sweep.run(pool, level, |_, _| Floats::<T>(PhantomData))
}

/// Sums of f32 products.
struct Floats<T>(PhantomData<T>);

impl<T> Clone for Floats<T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Floats<T> {}

impl<T: Element> Arithmetic for Floats<T> {
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
