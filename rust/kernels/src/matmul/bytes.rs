//! Products with weights of 8 bits and a scale per output; rows are quantized on the way, each with a scale of its own
//! (LLM.int8 without outlier columns, Dettmers et al. 2022, arXiv 2208.07339). A row x becomes `round(x * 127 / max|x|)`;
//! sums of products are exact in i32, so results are the same bits at every level. Weights are kept plus 128, because x86
//! multiplies unsigned with signed bytes; what that adds is 128 times the sum of a row's codes.
#![expect(unsafe_code, reason = "codes are written as bytes and read as words")]

use super::micro::Arithmetic;
use super::panels::{PANEL, PackError, Panels};
use super::sweep::Sweep;
use crate::dispatch::{Kernel, Level};
use crate::element::Element;
use crate::error::{KernelError, require_length};
use crate::pool::Pool;
use crate::rows::RowChunks;
use crate::shared_output::SharedOutput;
use crate::simd::{Simd, load_element, load_element_partial};

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
        if inputs > MAX_INPUTS {
            let rule = "at most 65536, so that sums of products fit 32 bits";
            return Err(KernelError::Unsupported { argument: "inputs", given: inputs as i64, rule }.into());
        }
        let panels = Panels::pack(pool, outputs, inputs, UNIT, |output, unit| {
            let row = &codes[output * inputs..][..inputs];
            let mut bytes = [0; UNIT];
            for (byte, &code) in bytes.iter_mut().zip(&row[unit * UNIT..]) {
                *byte = (code as u8) ^ 0x80;
            }
            u32::from_le_bytes(bytes)
        })?;
        let mut scales = scales.to_vec();
        scales.resize(outputs.next_multiple_of(PANEL), 0.0);
        Ok(Self { panels, scales })
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

/// Rows as codes, with what their products need; keeps its memory from one use to the next.
#[derive(Debug, Default)]
pub struct QuantizedRows {
    words: Vec<u32>,
    scales: Vec<f32>,
    /// Minus 128 times the sum of each row's codes.
    begins: Vec<i32>,
}

impl QuantizedRows {
    /// Takes rows of `inputs` elements.
    ///
    /// # Errors
    /// A length that is no whole number of rows.
    pub fn quantize<T: Element>(
        &mut self,
        pool: &Pool,
        level: Level,
        input: &[T],
        inputs: usize,
    ) -> Result<(), KernelError> {
        if inputs == 0 {
            return Err(KernelError::Unsupported { argument: "inputs", given: 0, rule: "at least 1" });
        }
        let rows = input.len() / inputs;
        require_length("input", rows * inputs, input.len())?;
        // Room for whole vectors behind the last code of a row; the next row overwrites it, or nothing does.
        let units = inputs.div_ceil(UNIT);
        self.words.clear();
        self.words.resize(rows * units, 0);
        self.scales.resize(rows, 0.0);
        self.begins.resize(rows, 0);
        let words = SharedOutput::new(&mut self.words);
        let (scales, begins) = (SharedOutput::new(&mut self.scales), SharedOutput::new(&mut self.begins));
        let chunks = RowChunks::new(rows, inputs * (size_of::<T>() + 1));
        pool.parallel_for(chunks.count(), |chunk| {
            for row in chunks.rows(chunk) {
                // SAFETY: every row belongs to one chunk and is written once, in all three arrays.
                let (words, scale, begin) =
                    unsafe { (words.part(row * units, units), scales.part(row, 1), begins.part(row, 1)) };
                let input = &input[row * inputs..][..inputs];
                (scale[0], begin[0]) = level.run(QuantizeRow { input, words });
            }
        })
    }

    fn rows(&self) -> usize {
        self.scales.len()
    }
}

/// Codes of one row; returns its scale and minus 128 times the sum of its codes.
struct QuantizeRow<'a, T> {
    input: &'a [T],
    words: &'a mut [u32],
}

impl<T: Element> Kernel for QuantizeRow<'_, T> {
    type Output = (f32, i32);

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> (f32, i32) {
        let length = self.input.len();
        assert!(self.words.len() * UNIT >= length);
        let (whole, rest) = (length - length % S::LANES, length % S::LANES);
        let input = self.input.as_ptr();
        let codes = self.words.as_mut_ptr().cast::<i8>();
        let mut largest = simd.splat_u32(0);
        let mut lanes = [0_u32; 16];
        // SAFETY: accesses cover `whole` elements in vectors and `rest` more in a partial one; codes fit their words.
        unsafe {
            let mut at = 0;
            while at < whole {
                largest = larger(simd, largest, load_element(simd, input.add(at)));
                at += S::LANES;
            }
            if rest > 0 {
                largest = larger(simd, largest, load_element_partial(simd, input.add(whole), rest));
            }
            simd.store_u32(lanes.as_mut_ptr(), largest);
        }
        let largest = f32::from_bits(lanes.into_iter().fold(0, u32::max));
        let factor = simd.splat(MAX_CODE / largest.max(LEAST));
        // SAFETY: as above; what remains goes through the stack, since a vector of codes would leave the row.
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
        (largest / MAX_CODE, -128 * sum_of_codes(simd, self.words))
    }
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

/// `output = input weights^T + bias`: sums times the output's scale, then the row's, then the bias, all in f32.
/// `output` has rows of `weights.outputs()` elements, `bias` one such row.
///
/// # Errors
/// Rows of another width, or another length.
pub fn multiply_bytes<T: Element>(
    pool: &Pool,
    level: Level,
    input: &QuantizedRows,
    weights: &PackedBytes,
    bias: Option<&[T]>,
    output: &mut [T],
) -> Result<(), KernelError> {
    let rows = input.rows();
    require_length("input", rows * weights.panels.units(), input.words.len())?;
    let sweep = Sweep { input: &input.words, rows, panels: &weights.panels, bias, output };
    sweep.run(pool, level, |first_row, panel| Bytes {
        begins: input.begins[first_row..].as_ptr(),
        row_scales: input.scales[first_row..].as_ptr(),
        scales: weights.scales[panel * PANEL..].as_ptr(),
    })
}

/// Exact sums of bytes.
#[derive(Clone, Copy)]
struct Bytes {
    /// Of the block's rows.
    begins: *const i32,
    row_scales: *const f32,
    /// Of the panel's outputs.
    scales: *const f32,
}

impl Arithmetic for Bytes {
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
