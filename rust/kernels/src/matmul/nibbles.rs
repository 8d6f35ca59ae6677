//! Products with weights of 4 bits, a scale and maybe a zero point per output and group of inputs; rows are quantized to
//! eight bits on the way, each with a scale of its own, as for weights of 8 bits (W4A8; Lin et al. 2024, arXiv
//! 2405.04532, has the same arithmetic on GPUs). Codes are unpacked with a mask and a shift into the bytes that one
//! instruction multiplies; no float is made within a group. Sums of a group are exact; groups are added in f32 in order.
//! A word holds eight inputs of an output: byte i the codes of input i (low half) and input 4 + i (high half).
#![expect(unsafe_code, reason = "micro-kernels on packed memory")]

use super::bytes::{QuantizeRow, SumOfCodes};
use super::micro::{Arithmetic, TileProduct, TileWords, block_of};
use super::panels::{PANEL, PackError, Panels};
use super::sweep::{Sweep, rows_of};
use super::tiles::{MatmulScratch, Packing, RowFormat, lanes};
use crate::dispatch::Level;
use crate::element::{Bf16, Element};
use crate::error::{KernelError, require_length};
use crate::huge_pages::{HugeArray, Number};
use crate::pool::Pool;
use crate::row_source::RowSource;
use crate::shared_output::SharedOutput;
use crate::simd::{Simd, load_element};
use std::io;

/// Inputs of a word.
const UNIT: usize = 8;
/// Words of a row that one word of weights meets.
const ROW_WORDS: usize = 2;
/// The zero point of codes that have none of their own.
const MIDDLE: i32 = 8;
/// So that 15 times 127 times so many stay below 2^24, and a group's sum is exact in f32.
pub const MAX_GROUP: usize = 8_192;
/// The low half of every byte.
const LOW_HALVES: u32 = 0x0f0f_0f0f;

/// The numbers of some outputs, as whoever packs gives them.
#[derive(Debug)]
pub struct NibbleRows<'a> {
    /// Codes from 0 to 15, one per byte, row after row.
    pub codes: &'a mut [u8],
    /// `outputs x groups`.
    pub scales: &'a mut [f32],
    /// The same, from 0 to 15; empty where all are 8.
    pub zeros: &'a mut [u8],
}

/// A weight `[outputs, inputs]` of 4-bit codes, packed.
#[derive(Debug)]
pub struct PackedNibbles {
    panels: Panels,
    /// Inputs of a group.
    group: usize,
    groups: usize,
    /// `panels x groups x PANEL`: bf16 where that is exact, which halves what a group of 32 reads beside its codes.
    scales: Scales,
    /// The same as bytes, or empty: as f32 they were a fifth of what a group of 32 reads.
    zeros: HugeArray<i8>,
}

#[derive(Debug)]
enum Scales {
    Bf16(HugeArray<Bf16>),
    F32(HugeArray<f32>),
}

impl PackedNibbles {
    /// Packs what `read(first, rows)` gives: outputs from `first` on, as many whole rows as there is room for. A group is
    /// a multiple of 8 inputs, up to 8,192.
    ///
    /// # Errors
    /// A shape or group that does not fit, no memory, or what `read` says.
    pub fn read(
        pool: &Pool,
        (outputs, inputs): (usize, usize),
        group: usize,
        has_zeros: bool,
        read: impl Fn(usize, NibbleRows<'_>) -> io::Result<()> + Sync,
    ) -> Result<Self, PackError> {
        if group == 0 || !group.is_multiple_of(UNIT) || group > MAX_GROUP {
            let rule = "a multiple of 8 up to 8192";
            return Err(KernelError::Unsupported { argument: "group", given: group as i64, rule }.into());
        }
        let groups = inputs.div_ceil(group);
        let padded = outputs.next_multiple_of(PANEL) * groups;
        // They are copied as soon as their format is known: huge arrays that share a mapping leave holes in it.
        let mut scales = vec![0.0_f32; padded];
        let mut zeros = HugeArray::<i8>::zeroed(if has_zeros { padded } else { 0 }).map_err(PackError::Memory)?;
        let (all_scales, all_zeros) = (SharedOutput::new(&mut scales), SharedOutput::new(&mut zeros));
        let panels = Panels::pack(pool, outputs, inputs, UNIT, |first, count, words| {
            let mut codes = vec![0; count * inputs];
            let mut row_scales = vec![0.0; count * groups];
            let mut row_zeros = vec![0; if has_zeros { count * groups } else { 0 }];
            read(first, NibbleRows { codes: &mut codes, scales: &mut row_scales, zeros: &mut row_zeros })?;
            let (from, length) = (first * groups, PANEL * groups);
            // SAFETY: every panel is packed once.
            let panel_scales = unsafe { all_scales.part(from, length) };
            // SAFETY: as above.
            let panel_zeros = unsafe { if has_zeros { all_zeros.part(from, length) } else { all_zeros.part(0, 0) } };
            for output in 0..count {
                for group in 0..groups {
                    panel_scales[group * PANEL + output] = row_scales[output * groups + group];
                    if has_zeros {
                        panel_zeros[group * PANEL + output] = row_zeros[output * groups + group].cast_signed();
                    }
                }
            }
            for (row, words) in codes.chunks_exact(inputs).zip(words.chunks_exact_mut(inputs.div_ceil(UNIT))) {
                for (codes, word) in row.chunks(UNIT).zip(words) {
                    let of = |input: usize| u32::from(codes.get(input).copied().unwrap_or(0) & 15);
                    *word = (0..4).map(|byte| (of(byte) | of(byte + 4) << 4) << (8 * byte)).sum();
                }
            }
            Ok(())
        })?;
        Ok(Self { panels, group, groups, scales: Scales::new(&scales)?, zeros })
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
        let scales = match &self.scales {
            Scales::Bf16(scales) => size_of_val::<[Bf16]>(scales),
            Scales::F32(scales) => size_of_val::<[f32]>(scales),
        };
        self.panels.bytes() + scales + size_of_val::<[i8]>(&self.zeros)
    }
}

impl Scales {
    fn new(scales: &[f32]) -> Result<Self, PackError> {
        if scales.iter().any(|scale| Bf16::from_f32(*scale).to_f32().to_bits() != scale.to_bits()) {
            let mut long = HugeArray::zeroed(scales.len()).map_err(PackError::Memory)?;
            long.copy_from_slice(scales);
            return Ok(Self::F32(long));
        }
        let mut short = HugeArray::zeroed(scales.len()).map_err(PackError::Memory)?;
        for (short, scale) in short.iter_mut().zip(scales.iter()) {
            *short = Bf16::from_f32(*scale);
        }
        Ok(Self::Bf16(short))
    }
}

/// `output = input weights^T + bias` for whole rows of `weights.inputs()` elements. `output` has rows of
/// `weights.outputs()` elements, `bias` one such row.
///
/// # Errors
/// A length that is no whole number of rows.
pub fn multiply_nibbles<T: Element>(
    pool: &Pool,
    level: Level,
    scratch: &mut MatmulScratch,
    input: &(impl RowSource<T> + ?Sized),
    weights: &PackedNibbles,
    bias: Option<&[T]>,
    output: &mut [T],
) -> Result<(), KernelError> {
    let panels = &weights.panels;
    let rows = rows_of(input, panels, bias, output)?;
    let (max_rows, units) = (max_rows(lanes(level)), panels.units() * ROW_WORDS);
    let packing = Packing { rows, width: panels.inputs(), max_rows, units, sums: weights.groups };
    scratch.fill(pool, level, packing, input, &AsGroups { words: weights.group / UNIT * ROW_WORDS })?;
    let rows = &*scratch;
    let sweep = Sweep { rows, panels, bias, output };
    match &weights.scales {
        Scales::Bf16(scales) => sweep.run(pool, level, |panel| PanelGroups::new(rows, weights, scales, panel)),
        Scales::F32(scales) => sweep.run(pool, level, |panel| PanelGroups::new(rows, weights, scales, panel)),
    }
}

fn max_rows(lanes: usize) -> usize {
    // Integers of a group and floats of all stay in registers.
    if lanes == 16 { 6 } else { 1 }
}

/// Rows as codes; the numbers of a row are the sums of its codes in each group.
struct AsGroups {
    /// Of a group.
    words: usize,
}

impl<T: Element> RowFormat<T> for AsGroups {
    fn convert(&self, level: Level, input: &[T], line: &mut [u32], sums: &mut [i32]) -> f32 {
        let scale = level.run(QuantizeRow { input, words: line });
        for (sum, words) in sums.iter_mut().zip(line.chunks(self.words)) {
            *sum = level.run(SumOfCodes { words });
        }
        scale
    }
}

/// The groups of a panel.
#[derive(Clone, Copy)]
struct PanelGroups<E> {
    /// `rows x groups` sums of codes.
    sums: *const i32,
    /// One per row.
    row_scales: *const f32,
    /// `groups x PANEL` of the panel.
    scales: *const E,
    /// The same, or null.
    zeros: *const i8,
    count: usize,
    /// Units of a group; the last one may have fewer.
    units: usize,
}

impl<E: Element + Number> PanelGroups<E> {
    fn new(rows: &MatmulScratch, weights: &PackedNibbles, scales: &HugeArray<E>, panel: usize) -> Self {
        let first = panel * PANEL * weights.groups;
        Self {
            sums: rows.sums.as_ptr(),
            row_scales: rows.scales.as_ptr(),
            scales: scales[first..].as_ptr(),
            zeros: if weights.zeros.is_empty() { core::ptr::null() } else { weights.zeros[first..].as_ptr() },
            count: weights.groups,
            units: weights.group / UNIT,
        }
    }
}

impl<E: Element> Arithmetic for PanelGroups<E> {
    fn max_rows(lanes: usize) -> usize {
        max_rows(lanes)
    }

    #[inline(always)]
    unsafe fn sums<S: Simd, const ROWS: usize, const VECTORS: usize>(
        self,
        simd: S,
        words: TileWords,
    ) -> [[S::F32; VECTORS]; ROWS] {
        let mut totals = [[simd.splat(0.0); VECTORS]; ROWS];
        let (mut source, mut input) = (words.panel, words.input);
        let has_zeros = !self.zeros.is_null();
        for group in 0..self.count {
            let units = self.units.min(words.units - group * self.units);
            let mut sums = [[simd.splat_u32(0); VECTORS]; ROWS];
            // SAFETY: there is a sum per row and group, and a scale and a zero point per output and group; a unit has
            // `PANEL` words here and `ROW_WORDS * ROWS` there.
            unsafe {
                let row_sums = self.sums.add(words.first_row * self.count + group);
                if !has_zeros {
                    for (row, sums) in sums.iter_mut().enumerate() {
                        *sums = [simd.splat_u32((-MIDDLE * *row_sums.add(row * self.count)) as u32); VECTORS];
                    }
                }
                for _ in 0..units {
                    let mut low = [simd.splat_u32(0); VECTORS];
                    let mut high = low;
                    for vector in 0..VECTORS {
                        let codes = simd.load_u32(source.add(vector * S::LANES));
                        low[vector] = simd.and_u32(codes, simd.splat_u32(LOW_HALVES));
                        high[vector] = simd.and_u32(simd.shift_right::<4>(codes), simd.splat_u32(LOW_HALVES));
                    }
                    for (row, sums) in sums.iter_mut().enumerate() {
                        let (first, second) = (simd.splat_u32(*input.add(row)), simd.splat_u32(*input.add(ROWS + row)));
                        for vector in 0..VECTORS {
                            sums[vector] = simd.dot_bytes(sums[vector], low[vector], first);
                            sums[vector] = simd.dot_bytes(sums[vector], high[vector], second);
                        }
                    }
                    (source, input) = (source.add(PANEL), input.add(ROW_WORDS * ROWS));
                }
                for vector in 0..VECTORS {
                    let at = group * PANEL + vector * S::LANES;
                    let scales = load_element(simd, self.scales.add(at));
                    let zeros = if has_zeros { simd.load_signed_bytes(self.zeros.add(at)) } else { simd.splat(0.0) };
                    for row in 0..ROWS {
                        let mut sum = simd.i32_to_f32(sums[row][vector]);
                        if has_zeros {
                            // Exact: both are integers below 2^24.
                            let codes = simd.splat(-(*row_sums.add(row * self.count) as f32));
                            sum = simd.mul_add(zeros, codes, sum);
                        }
                        totals[row][vector] = simd.mul_add(sum, scales, totals[row][vector]);
                    }
                }
            }
        }
        for (row, totals) in totals.iter_mut().enumerate() {
            // SAFETY: there is a scale per row.
            let scale = simd.splat(unsafe { *self.row_scales.add(words.first_row + row) });
            for total in totals {
                *total = simd.mul(*total, scale);
            }
        }
        totals
    }

    #[inline(always)]
    unsafe fn run<S: Simd, T: Element>(self, simd: S, product: TileProduct<T>) {
        // SAFETY: the caller's promise.
        unsafe {
            if S::LANES == 16 {
                block_of!(product.rows, [1, 2, 3, 4, 5, 6], 2, self, simd, product);
            } else {
                block_of!(product.rows, [1], 4, self, simd, product);
            }
        }
    }
}

/// Codes of a stored row, two to a byte.
///
/// # Errors
/// Another length.
pub fn unpack(packed: &[u8], codes: &mut [u8]) -> Result<(), KernelError> {
    require_length("packed", codes.len().div_ceil(2), packed.len())?;
    for (pair, byte) in codes.chunks_mut(2).zip(packed) {
        pair[0] = byte & 15;
        if let Some(second) = pair.get_mut(1) {
            *second = byte >> 4;
        }
    }
    Ok(())
}
