//! A projection `y = x W^T + b` with its weight packed once. Which scheme a weight has is decided when it is read, and is
//! all that differs: a new scheme is one variant here and one arithmetic in the kernels. It does not know what is projected.

use crate::description::{LinearDescription, WeightSource};
use crate::error::LoadError;
use crate::source::Stack;
use crate::{fp8, nibbles, turned};
use llmscale_kernels::dispatch::Level;
use llmscale_kernels::element::Element;
use llmscale_kernels::error::KernelError;
use llmscale_kernels::matmul::bytes::{PackedBytes, multiply_bytes};
use llmscale_kernels::matmul::dense::{PackedWeights, multiply};
use llmscale_kernels::matmul::nibbles::{PackedNibbles, multiply_nibbles};
use llmscale_kernels::matmul::{MatmulScratch, PackError};
use llmscale_kernels::pool::Pool;
use llmscale_kernels::rounding::round_to_bytes;
use llmscale_kernels::row_source::RowSource;
use std::io;

/// Threads and the instruction level of a call.
#[derive(Clone, Copy, Debug)]
pub struct Processor<'a> {
    /// Threads.
    pub pool: &'a Pool,
    /// Instructions.
    pub level: Level,
}

/// A weight and a bias.
#[derive(Debug)]
pub struct Linear<T> {
    weight: Weight<T>,
    bias: Option<Vec<T>>,
}

#[derive(Debug)]
enum Weight<T> {
    Dense(PackedWeights<T>),
    Bytes(PackedBytes),
    Nibbles(PackedNibbles),
}

impl<T: Element> Linear<T> {
    /// Reads and packs.
    pub fn load(on: Processor<'_>, description: &LinearDescription) -> Result<Self, LoadError> {
        let pool = on.pool;
        let (outputs, inputs) = description.weight.shape();
        let weight = match &description.weight {
            WeightSource::Dense(stack) => {
                Weight::Dense(PackedWeights::read(pool, outputs, inputs, |first, rows| stack.read(first, rows))?)
            }
            WeightSource::MadeBytes(stack) => Weight::Bytes(made_bytes(on, stack)?),
            WeightSource::StoredBytes { codes, scales } => {
                let scales = scales_of(codes, scales)?;
                Weight::Bytes(PackedBytes::read(pool, outputs, inputs, |first, rows, row_scales| {
                    row_scales.copy_from_slice(&scales[first..][..row_scales.len()]);
                    codes.read_bytes(first, rows)
                })?)
            }
            WeightSource::MadeNibbles { stack, group, symmetric } => {
                Weight::Nibbles(nibbles::made(on, stack, *group, *symmetric)?)
            }
            WeightSource::StoredNibbles { codes, scales, zeros, inputs, group } => {
                Weight::Nibbles(nibbles::stored(pool, codes, scales, zeros.as_ref(), *inputs, *group)?)
            }
            WeightSource::TurnedNibbles { parts, packing, inputs, group } => {
                Weight::Nibbles(turned::load(pool, parts, *packing, *inputs, *group)?)
            }
            WeightSource::Fp8 { codes, scales, kind } => Weight::Dense(fp8::load(pool, codes, scales, *kind)?),
        };
        let bias = description.bias.as_ref().map(Stack::read_all).transpose()?;
        if let Some(bias) = &bias
            && bias.len() != outputs
        {
            return Err(LoadError::Shape(format!("a bias of {} elements for {outputs} outputs", bias.len())));
        }
        Ok(Self { weight, bias })
    }

    /// Whether rows of the weight can be looked up.
    pub fn is_table(&self) -> bool {
        !matches!(self.weight, Weight::Nibbles(_))
    }

    /// Copies rows of the weight: `out[i]` is row `ids[i]`.
    ///
    /// # Errors
    /// An id that there is not, another length, or a weight that is no table; nothing has been written then.
    pub fn gather(&self, on: Processor<'_>, ids: &[i32], out: &mut [T]) -> Result<(), KernelError> {
        match &self.weight {
            Weight::Dense(weight) => weight.gather(on.pool, ids, out),
            Weight::Bytes(weight) => weight.gather(on.pool, ids, out),
            Weight::Nibbles(_) => {
                let rule = "eight or more: rows of four bits are not looked up";
                Err(KernelError::Unsupported { argument: "bits", given: 4, rule })
            }
        }
    }

    /// Elements of a result.
    pub fn outputs(&self) -> usize {
        match &self.weight {
            Weight::Dense(weight) => weight.outputs(),
            Weight::Bytes(weight) => weight.outputs(),
            Weight::Nibbles(weight) => weight.outputs(),
        }
    }

    /// Elements of a row.
    pub fn inputs(&self) -> usize {
        match &self.weight {
            Weight::Dense(weight) => weight.inputs(),
            Weight::Bytes(weight) => weight.inputs(),
            Weight::Nibbles(weight) => weight.inputs(),
        }
    }

    /// Memory that it holds.
    pub fn bytes(&self) -> usize {
        let weight = match &self.weight {
            Weight::Dense(weight) => weight.bytes(),
            Weight::Bytes(weight) => weight.bytes(),
            Weight::Nibbles(weight) => weight.bytes(),
        };
        weight + self.bias.as_ref().map_or(0, |bias| bias.len() * size_of::<T>())
    }

    /// `output = input W^T + b` for whole rows.
    ///
    /// # Errors
    /// A length that does not fit.
    pub fn apply(
        &self,
        on: Processor<'_>,
        scratch: &mut MatmulScratch,
        input: &(impl RowSource<T> + ?Sized),
        output: &mut [T],
    ) -> Result<(), KernelError> {
        let bias = self.bias.as_deref();
        match &self.weight {
            Weight::Dense(weight) => multiply(on.pool, on.level, scratch, input, weight, bias, output),
            Weight::Bytes(weight) => multiply_bytes(on.pool, on.level, scratch, input, weight, bias, output),
            Weight::Nibbles(weight) => multiply_nibbles(on.pool, on.level, scratch, input, weight, bias, output),
        }
    }
}

fn made_bytes(on: Processor<'_>, stack: &Stack) -> Result<PackedBytes, PackError> {
    PackedBytes::read(on.pool, stack.rows(), stack.columns(), |first, codes, scales| {
        make_bytes(on.level, stack, first, codes, scales)
    })
}

/// Rounds whole rows to the nearest of 255 codes.
fn make_bytes(level: Level, stack: &Stack, first: usize, codes: &mut [i8], scales: &mut [f32]) -> io::Result<()> {
    let mut rows = vec![0.0_f32; codes.len()];
    stack.read(first, &mut rows)?;
    let width = stack.columns();
    for ((at, row), (codes, scale)) in
        (first..).zip(rows.chunks_exact(width)).zip(codes.chunks_exact_mut(width).zip(scales))
    {
        *scale = round_to_bytes(level, row, codes);
        if !scale.is_finite() {
            return Err(stack.not_finite(at));
        }
    }
    Ok(())
}

/// A scale for each output, of tensors with one per row or one in all.
fn scales_of(codes: &Stack, scales: &Stack) -> Result<Vec<f32>, LoadError> {
    let mut all = Vec::with_capacity(codes.rows());
    for (codes, scales) in codes.parts().iter().zip(scales.parts()) {
        let given = Stack::new(vec![scales.clone()])?.read_all::<f32>()?;
        check_scales(&given)?;
        match given.len() {
            1 => all.extend(std::iter::repeat_n(given[0], codes.rows)),
            length if length == codes.rows => all.extend(given),
            length => return Err(LoadError::Shape(format!("{length} scales for {} outputs", codes.rows))),
        }
    }
    if all.len() != codes.rows() {
        return Err(LoadError::Shape(format!("{} scales for {} outputs", all.len(), codes.rows())));
    }
    Ok(all)
}

/// Refuses scales of bytes or e4m3 that no quantization gives.
pub(crate) fn check_scales(scales: &[f32]) -> Result<(), LoadError> {
    check(scales, |scale| scale.is_finite() && scale >= 0.0, "negative or not a finite number")
}

/// Refuses scales of four bits that no quantization gives. A negative one is right: codes reach from -8 to 7 around their
/// zero point, and `AutoRound` gives -8 to the larger end of a group, whatever its sign.
pub(crate) fn check_signed_scales(scales: &[f32]) -> Result<(), LoadError> {
    check(scales, f32::is_finite, "not a finite number")
}

fn check(scales: &[f32], is_right: impl Fn(f32) -> bool, what: &str) -> Result<(), LoadError> {
    let Some(bad) = scales.iter().find(|scale| !is_right(**scale)) else { return Ok(()) };
    Err(LoadError::Shape(format!(
        "A quantized weight has the scale {bad}, which is {what}. Download or quantize it again."
    )))
}

#[cfg(test)]
mod tests {
    use super::{check_scales, check_signed_scales};

    #[test]
    fn only_scales_of_four_bits_may_be_negative_and_none_may_be_no_number() {
        assert!(check_scales(&[0.0, 0.5]).is_ok() && check_signed_scales(&[0.0, -0.5, 0.5]).is_ok());
        let refused = check_scales(&[0.5, -0.25]).unwrap_err().to_string();
        assert!(refused.contains("has the scale -0.25, which is negative or not a finite number"), "{refused}");
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            assert!(check_scales(&[0.5, bad]).is_err());
            let refused = check_signed_scales(&[0.5, bad]).unwrap_err().to_string();
            assert!(refused.contains(&format!("has the scale {bad}, which is not a finite number")), "{refused}");
        }
    }
}
