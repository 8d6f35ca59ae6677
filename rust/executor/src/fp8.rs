//! Weights in e4m3 (four bits of exponent, three of fraction; Micikevicius et al. 2022, arXiv 2209.05433) with a scale for
//! each tensor, output, or block of outputs and inputs. No processor multiplies them, so they become dense while they are
//! read: a weight is code times scale in f32, rounded once. Linear in the weights. It does not know products.

use crate::error::LoadError;
use crate::linear::check_scales;
use crate::source::{Stack, Stored};
use llmscale_kernels::element::Element;
use llmscale_kernels::matmul::dense::PackedWeights;
use llmscale_kernels::pool::Pool;
use std::io;

/// What shares a scale.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fp8Scales {
    /// All of a tensor.
    Tensor,
    /// The inputs of an output.
    Channel,
    /// So many outputs and inputs.
    Block(usize),
}

/// Reads, converts and packs. `scales` has a part for each of `codes`.
pub(crate) fn load<T: Element>(
    pool: &Pool,
    codes: &Stack,
    scales: &[Stack],
    kind: Fp8Scales,
) -> Result<PackedWeights<T>, LoadError> {
    let inputs = codes.columns();
    let grid = Grid::new(codes, scales, kind)?;
    let values = values();
    let packed = PackedWeights::read(pool, codes.rows(), inputs, |first, rows: &mut [T]| {
        let mut bytes = vec![0; rows.len()];
        codes.read_raw(Stored::F8, first, &mut bytes)?;
        for (index, (row, bytes)) in rows.chunks_exact_mut(inputs).zip(bytes.chunks_exact(inputs)).enumerate() {
            let scales = grid.of_output(first + index);
            for (column, (value, code)) in row.iter_mut().zip(bytes).enumerate() {
                let number = values[usize::from(*code)];
                if number.is_nan() {
                    return Err(io::Error::new(io::ErrorKind::InvalidData, "a weight in e4m3 is not a number"));
                }
                *value = T::from_f32(number * scales[column / grid.block_inputs]);
            }
        }
        Ok(())
    })?;
    Ok(packed)
}

/// Scales by output: rows of `columns`, each for `block_inputs` inputs.
struct Grid {
    scales: Vec<f32>,
    columns: usize,
    block_inputs: usize,
    /// The row of scales of each output.
    rows: Vec<usize>,
}

impl Grid {
    fn new(codes: &Stack, scales: &[Stack], kind: Fp8Scales) -> Result<Self, LoadError> {
        let (block_outputs, block_inputs) = match kind {
            Fp8Scales::Tensor => (usize::MAX, codes.columns().max(1)),
            Fp8Scales::Channel => (1, codes.columns().max(1)),
            Fp8Scales::Block(0) => return Err(LoadError::Shape("blocks of no weights share a scale".into())),
            Fp8Scales::Block(side) => (side, side),
        };
        let columns = codes.columns().div_ceil(block_inputs);
        let mut grid = Self { scales: Vec::new(), columns, block_inputs, rows: Vec::with_capacity(codes.rows()) };
        if scales.len() != codes.parts().len() {
            return Err(LoadError::Shape(format!("{} tensors of scales for {}", scales.len(), codes.parts().len())));
        }
        for (part, scales) in codes.parts().iter().zip(scales) {
            let given = scales.read_all::<f32>()?;
            check_scales(&given)?;
            let needed = part.rows.div_ceil(block_outputs) * columns;
            if given.len() != needed {
                return Err(LoadError::Shape(format!(
                    "{} scales of weights in e4m3, {needed} are needed",
                    given.len()
                )));
            }
            let first = grid.scales.len() / columns.max(1);
            grid.rows.extend((0..part.rows).map(|row| first + row / block_outputs));
            grid.scales.extend(given);
        }
        Ok(grid)
    }

    fn of_output(&self, output: usize) -> &[f32] {
        &self.scales[self.rows[output] * self.columns..][..self.columns]
    }
}

/// The number of each code.
fn values() -> [f32; 256] {
    core::array::from_fn(|code| {
        let (exponent, fraction) = ((code >> 3 & 15) as i32, (code & 7) as f32);
        let size = match (exponent, code & 7) {
            (15, 7) => f32::NAN,
            (0, _) => fraction * 2.0_f32.powi(-9),
            _ => (1.0 + fraction / 8.0) * 2.0_f32.powi(exponent - 7),
        };
        if code & 0x80 == 0 { size } else { -size }
    })
}

#[cfg(test)]
mod tests {
    use super::values;

    #[test]
    fn codes_are_the_numbers_of_the_format() {
        let values = values();
        for (code, value) in
            [(0x00, 0.0), (0x38, 1.0), (0xb8, -1.0), (0x7e, 448.0), (0x01, 0.001_953_125), (0x08, 0.015_625)]
        {
            assert_eq!(values[code].to_bits(), f32::to_bits(value), "{code:#x}");
        }
        assert!(values[0x7f].is_nan() && values[0xff].is_nan());
        assert!((1..0x7f).all(|code| values[code] > values[code - 1]), "they rise with their codes");
    }
}
