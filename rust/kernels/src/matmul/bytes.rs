//! Products with weights of 8 bits and a scale per output; rows are quantized on the way, each with a scale of its own
//! (LLM.int8 without outlier columns, Dettmers et al. 2022, arXiv 2208.07339). A row x becomes `round(x * 127 / max|x|)`;
//! sums of products are exact in i32, so results are the same bits at every level. Weights are kept plus 128, because x86
//! multiplies unsigned with signed bytes; what that adds is 128 times the sum of a row's codes.
#![expect(unsafe_code, reason = "codes are written as bytes and read as words")]

use super::micro::{Arithmetic, WordArithmetic, Words};
use super::panels::{PANEL, PackError, Panels};
use super::sweep::{Sweep, rows_of};
use super::tiles::{MatmulScratch, Packing, RowFormat, lanes};
use crate::dispatch::{Kernel, Level};
use crate::element::Element;
use crate::error::{KernelError, require_length};
use crate::pool::Pool;
use crate::row_source::RowSource;
use crate::shared_output::SharedOutput;
use crate::simd::{Simd, load_element, load_element_partial};
use std::io;

/// Inputs of a word.
const UNIT: usize = 4;
/// So that 255 times 127 times so many stay below 2^31.
const MAX_INPUTS: usize = 1 << 16;
/// Codes of activations lie between minus this and this.
const MAX_CODE: f32 = 127.0;
/// Least divisor, so that a row of zeros has codes of zero.
const LEAST: f32 = 1e-36;

/// A weight `[outputs, inputs]` of signed bytes with a scale per output, packed.
#[derive(Debug)]
pub struct PackedBytes {
    panels: Panels,
    /// One per output, padded to whole panels.
    scales: Vec<f32>,
}

impl PackedBytes {
    /// Packs `codes`, `outputs x inputs`, row after row.
    ///
    /// # Errors
    /// A shape of zero or another length, more than 65,536 inputs, or no memory.
    pub fn pack(pool: &Pool, codes: &[i8], scales: &[f32], outputs: usize, inputs: usize) -> Result<Self, PackError> {
        require_length("codes", outputs * inputs, codes.len())?;
        require_length("scales", outputs, scales.len())?;
        Self::read(pool, outputs, inputs, |first, rows, row_scales| {
            rows.copy_from_slice(&codes[first * inputs..][..rows.len()]);
            row_scales.copy_from_slice(&scales[first..][..row_scales.len()]);
            Ok(())
        })
    }

    /// Packs what `read(first, codes, scales)` gives: outputs from `first` on, as many whole rows of `inputs` codes as there
    /// is room for, and a scale for each.
    ///
    /// # Errors
    /// A shape of zero, more than 65,536 inputs, no memory, or what `read` says.
    pub fn read(
        pool: &Pool,
        outputs: usize,
        inputs: usize,
        read: impl Fn(usize, &mut [i8], &mut [f32]) -> io::Result<()> + Sync,
    ) -> Result<Self, PackError> {
        if inputs > MAX_INPUTS {
            let rule = "at most 65536, so that sums of products fit 32 bits";
            return Err(KernelError::Unsupported { argument: "inputs", given: inputs as i64, rule }.into());
        }
        let mut scales = vec![0.0; outputs.next_multiple_of(PANEL)];
        let all_scales = SharedOutput::new(&mut scales);
        let panels = Panels::pack(pool, outputs, inputs, UNIT, |first, count, words| {
            let mut codes = vec![0_i8; count * inputs];
            // SAFETY: every output belongs to one panel, which is packed once.
            read(first, &mut codes, unsafe { all_scales.part(first, count) })?;
            let units = inputs.div_ceil(UNIT);
            for (row, words) in codes.chunks_exact(inputs).zip(words.chunks_exact_mut(units)) {
                for (codes, word) in row.chunks(UNIT).zip(words) {
                    let mut bytes = [0; UNIT];
                    for (byte, &code) in bytes.iter_mut().zip(codes) {
                        *byte = (code as u8) ^ 0x80;
                    }
                    *word = u32::from_le_bytes(bytes);
                }
            }
            Ok(())
        })?;
        Ok(Self { panels, scales })
    }

    /// Copies rows of the weight, as a table: `out[i]` is row `ids[i]`, rounded to its format, `ids.len() x inputs`.
    ///
    /// # Errors
    /// An id that the table does not have, or another length; nothing has been written then.
    pub fn gather<T: Element>(&self, pool: &Pool, ids: &[i32], out: &mut [T]) -> Result<(), KernelError> {
        self.panels.gather(pool, ids, out, |output, word| {
            word.to_le_bytes().map(|byte| T::from_f32(f32::from((byte ^ 0x80) as i8) * self.scales[output]))
        })
    }

    /// Outputs, without padding.
    pub fn outputs(&self) -> usize {
        self.panels.outputs()
    }

    /// Inputs.
    pub fn inputs(&self) -> usize {
        self.panels.inputs()
    }

    /// Memory that it holds.
    pub fn bytes(&self) -> usize {
        self.panels.bytes() + self.scales.len() * 4
    }
}

/// Codes of one row, with zeros behind the last; returns its scale.
pub(super) struct QuantizeRow<'a, T> {
    pub(super) input: &'a [T],
    pub(super) words: &'a mut [u32],
}

impl<T: Element> Kernel for QuantizeRow<'_, T> {
    type Output = f32;

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> f32 {
        let length = self.input.len();
        assert!(self.words.len() * UNIT >= length);
        self.words[length / UNIT..].fill(0);
        let (whole, rest) = (length - length % S::LANES, length % S::LANES);
        let input = self.input.as_ptr();
        let codes = self.words.as_mut_ptr().cast::<i8>();
        let largest = largest_of(simd, self.input);
        let factor = simd.splat(MAX_CODE / largest.max(LEAST));
        // SAFETY: accesses cover `whole` elements in vectors and `rest` more in a partial one; codes fit their words. What
        // remains goes through the stack, since a vector of codes would leave the row.
        unsafe {
            let mut at = 0;
            while at < whole {
                simd.store_signed_bytes(codes.add(at), simd.mul(load_element(simd, input.add(at)), factor));
                at += S::LANES;
            }
            if rest > 0 {
                let mut last = [0_i8; 16];
                let value = load_element_partial(simd, input.add(whole), rest);
                simd.store_signed_bytes(last.as_mut_ptr(), simd.mul(value, factor));
                core::ptr::copy_nonoverlapping(last.as_ptr(), codes.add(whole), rest);
            }
        }
        largest / MAX_CODE
    }
}

/// The sum of all signed bytes of some words.
pub(super) struct SumOfCodes<'a> {
    pub(super) words: &'a [u32],
}

impl Kernel for SumOfCodes<'_> {
    type Output = i32;

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> i32 {
        sum_of_codes(simd, self.words)
    }
}

/// The greatest magnitude of a row; NaN where the row has one.
#[inline(always)]
fn largest_of<S: Simd, T: Element>(simd: S, row: &[T]) -> f32 {
    let (whole, rest) = (row.len() - row.len() % S::LANES, row.len() % S::LANES);
    let mut largest = simd.splat_u32(0);
    let mut lanes = [0_u32; 16];
    // SAFETY: accesses cover `whole` elements in vectors and `rest` more in a partial one; there are `LANES` lanes.
    unsafe {
        for at in (0..whole).step_by(S::LANES) {
            largest = larger(simd, largest, load_element(simd, row.as_ptr().add(at)));
        }
        if rest > 0 {
            largest = larger(simd, largest, load_element_partial(simd, row.as_ptr().add(whole), rest));
        }
        simd.store_u32(lanes.as_mut_ptr(), largest);
    }
    f32::from_bits(lanes.into_iter().fold(0, u32::max))
}

/// The larger magnitudes, as bits: these are ordered like numbers, with NaN above all.
#[inline(always)]
fn larger<S: Simd>(simd: S, largest: S::U32, value: S::F32) -> S::U32 {
    let bits = simd.and_u32(simd.f32_to_bits(value), simd.splat_u32(0x7fff_ffff));
    let more = simd.less_equal_u32(largest, bits);
    simd.f32_to_bits(simd.select(more, simd.bits_to_f32(bits), simd.bits_to_f32(largest)))
}

/// The sum of all signed bytes.
#[inline(always)]
fn sum_of_codes<S: Simd>(simd: S, words: &[u32]) -> i32 {
    let ones = simd.splat_u32(0x0101_0101);
    let mut sums = simd.splat_u32(0);
    let mut chunks = words.chunks_exact(S::LANES);
    let mut lanes = [0_u32; 16];
    for chunk in &mut chunks {
        // SAFETY: a chunk holds `LANES` words.
        sums = simd.dot_bytes(sums, ones, unsafe { simd.load_u32(chunk.as_ptr()) });
    }
    // SAFETY: there are at least `LANES` lanes.
    unsafe { simd.store_u32(lanes.as_mut_ptr(), sums) };
    let rest = chunks.remainder().iter().flat_map(|word| word.to_le_bytes()).map(|byte| i32::from(byte as i8));
    lanes.into_iter().map(|lane| lane as i32).sum::<i32>() + rest.sum::<i32>()
}

/// `output = input weights^T + bias`: sums times the output's scale, then the row's, then the bias, all in f32. Rows are
/// whole; `output` has rows of `weights.outputs()` elements, `bias` one such row.
///
/// # Errors
/// A length that is no whole number of rows.
pub fn multiply_bytes<T: Element>(
    pool: &Pool,
    level: Level,
    scratch: &mut MatmulScratch,
    input: &(impl RowSource<T> + ?Sized),
    weights: &PackedBytes,
    bias: Option<&[T]>,
    output: &mut [T],
) -> Result<(), KernelError> {
    let panels = &weights.panels;
    let rows = rows_of(input, panels, bias, output)?;
    let max_rows = Words::<Bytes>::max_rows(lanes(level));
    let packing = Packing { rows, width: panels.inputs(), max_rows, units: panels.units(), sums: 1 };
    scratch.fill(pool, level, packing, input, &AsCodes)?;
    let rows = &*scratch;
    Sweep { rows, panels, bias, output }.run(pool, level, |panel| {
        Words(Bytes {
            begins: rows.sums.as_ptr(),
            row_scales: rows.scales.as_ptr(),
            scales: weights.scales[panel * PANEL..].as_ptr(),
        })
    })
}

/// Rows as codes; the number of a row is minus 128 times their sum.
struct AsCodes;

impl<T: Element> RowFormat<T> for AsCodes {
    fn convert(&self, level: Level, input: &[T], line: &mut [u32], sums: &mut [i32]) -> f32 {
        let scale = level.run(QuantizeRow { input, words: line });
        sums[0] = -128 * level.run(SumOfCodes { words: line });
        scale
    }
}

/// Exact sums of bytes.
#[derive(Clone, Copy)]
struct Bytes {
    /// One per row.
    begins: *const i32,
    row_scales: *const f32,
    /// Of the panel's outputs.
    scales: *const f32,
}

impl WordArithmetic for Bytes {
    #[inline(always)]
    fn begin<S: Simd>(self, simd: S, row: usize) -> S::U32 {
        // SAFETY: there is one per row.
        simd.splat_u32(unsafe { *self.begins.add(row) } as u32)
    }

    #[inline(always)]
    fn add<S: Simd>(self, simd: S, sum: S::U32, input: S::U32, weights: S::U32) -> S::U32 {
        simd.dot_bytes(sum, weights, input)
    }

    #[inline(always)]
    fn finish<S: Simd>(self, simd: S, row: usize, output: usize, sum: S::U32) -> S::F32 {
        // SAFETY: there is a scale per row, and one per output of the panel.
        let (row_scale, scales) = unsafe { (*self.row_scales.add(row), simd.load(self.scales.add(output))) };
        simd.mul(simd.mul(simd.i32_to_f32(sum), scales), simd.splat(row_scale))
    }
}
