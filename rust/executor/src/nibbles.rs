//! Weights of four bits on their way from files: rounded to the nearest while a dense weight is read, or as a checkpoint
//! of compressed-tensors stores them. Linear in the weights. It does not know products.

use crate::error::LoadError;
use crate::linear::{Processor, check_signed_scales};
use crate::source::{Stack, Stored};
use llmscale_kernels::dispatch::Level;
use llmscale_kernels::matmul::nibbles::{MAX_GROUP, NibbleRows, PackedNibbles, unpack};
use llmscale_kernels::pool::Pool;
use llmscale_kernels::rounding::round_to_nibbles;
use std::io;

/// Codes in a word.
const CODES: usize = 8;

/// Rounds a dense weight.
pub(crate) fn made(
    on: Processor<'_>,
    stack: &Stack,
    group: usize,
    symmetric: bool,
) -> Result<PackedNibbles, LoadError> {
    let (outputs, inputs) = (stack.rows(), stack.columns());
    if group == 0 || !inputs.is_multiple_of(group) {
        return Err(LoadError::Shape(format!("groups of {group} inputs do not divide {inputs}")));
    }
    let times = Groups::of(group, inputs)?;
    let packed = PackedNibbles::read(on.pool, (outputs, inputs), times.group, !symmetric, |first, mut rows| {
        let mut values = vec![0.0_f32; rows.codes.len()];
        stack.read(first, &mut values)?;
        round(on.level, &values, group, times.repeats, &mut rows);
        let broken = rows.scales.iter().position(|scale| !scale.is_finite());
        broken.map_or(Ok(()), |at| Err(stack.not_finite(first + at / inputs.div_ceil(times.group))))
    })?;
    Ok(packed)
}

/// Chooses scale, zero point and codes for every group of some rows.
fn round(level: Level, values: &[f32], group: usize, repeats: usize, rows: &mut NibbleRows<'_>) {
    for (index, (values, codes)) in values.chunks_exact(group).zip(rows.codes.chunks_exact_mut(group)).enumerate() {
        let (scale, zero) = round_to_nibbles(level, values, rows.zeros.is_empty(), codes);
        let places = index * repeats..(index + 1) * repeats;
        rows.scales[places.clone()].fill(scale);
        if !rows.zeros.is_empty() {
            rows.zeros[places].fill(zero);
        }
    }
}

/// Takes stored codes, scales and zero points.
pub(crate) fn stored(
    pool: &Pool,
    codes: &Stack,
    scales: &Stack,
    zeros: Option<&Stack>,
    inputs: usize,
    group: usize,
) -> Result<PackedNibbles, LoadError> {
    let outputs = codes.rows();
    let stored_groups = inputs.div_ceil(group.max(1));
    let needed =
        [(codes.columns(), inputs.div_ceil(CODES)), (scales.columns(), stored_groups), (scales.rows(), outputs)];
    if let Some((given, wanted)) = needed.into_iter().find(|(given, wanted)| given != wanted) {
        return Err(LoadError::Shape(format!("a weight of 4 bits has {given} entries where {wanted} are needed")));
    }
    let all_scales: Vec<f32> = scales.read_all()?;
    check_signed_scales(&all_scales)?;
    let all_zeros = zeros.map(|zeros| zero_points(codes, zeros, stored_groups)).transpose()?;
    let times = Groups::of(group.min(inputs), inputs)?;
    let packed = PackedNibbles::read(pool, (outputs, inputs), times.group, zeros.is_some(), |first, rows| {
        let count = rows.codes.len() / inputs;
        let row_bytes = codes.columns() * 4;
        let mut bytes = vec![0; count * row_bytes];
        codes.read_raw(Stored::I32, first, &mut bytes)?;
        for (row, bytes) in rows.codes.chunks_exact_mut(inputs).zip(bytes.chunks_exact(row_bytes)) {
            unpack(&bytes[..inputs.div_ceil(2)], row).map_err(io::Error::other)?;
        }
        let groups = inputs.div_ceil(times.group);
        for output in 0..count {
            for at in 0..groups {
                let (to, from) = (output * groups + at, (first + output) * stored_groups + at / times.repeats);
                rows.scales[to] = all_scales[from];
                if let Some(zeros) = &all_zeros {
                    rows.zeros[to] = zeros[from];
                }
            }
        }
        Ok(())
    })?;
    Ok(packed)
}

/// Zero points `outputs x groups` of tensors with eight outputs to a word.
fn zero_points(codes: &Stack, zeros: &Stack, groups: usize) -> Result<Vec<u8>, LoadError> {
    let mut all = Vec::with_capacity(codes.rows() * groups);
    if zeros.parts().len() != codes.parts().len() {
        return Err(LoadError::Shape("some parts of a weight of 4 bits have zero points, others none".into()));
    }
    for (codes, zeros) in codes.parts().iter().zip(zeros.parts()) {
        let words = Stack::new(vec![zeros.clone()])?;
        if (words.rows(), words.columns()) != (codes.rows.div_ceil(CODES), groups) {
            return Err(LoadError::Shape(format!("zero points are {} x {}", words.rows(), words.columns())));
        }
        let mut bytes = vec![0; words.rows() * groups * 4];
        let read = words.read_raw(Stored::I32, 0, &mut bytes);
        read.map_err(|problem| LoadError::File { path: "a file of weights".into(), problem })?;
        for output in 0..codes.rows {
            for group in 0..groups {
                let byte = bytes[(output / CODES * groups + group) * 4 + output % CODES / 2];
                all.push(if output.is_multiple_of(2) { byte & 15 } else { byte >> 4 });
            }
        }
    }
    Ok(all)
}

/// Groups as kernels take them: parts of the checkpoint's, with its scales repeated.
pub(crate) struct Groups {
    pub(crate) group: usize,
    /// Of each scale.
    pub(crate) repeats: usize,
}

impl Groups {
    pub(crate) fn of(group: usize, inputs: usize) -> Result<Self, LoadError> {
        if group >= inputs && inputs <= MAX_GROUP {
            return Ok(Self { group: inputs.next_multiple_of(CODES), repeats: 1 });
        }
        let fits = |part: usize| group.is_multiple_of(part) && part <= MAX_GROUP;
        let part = (1..=MAX_GROUP / CODES).rev().map(|eights| eights * CODES).find(|&part| fits(part));
        let part = part.ok_or_else(|| LoadError::Shape(format!("groups of {group} inputs are no multiple of 8")))?;
        Ok(Self { group: part, repeats: group / part })
    }
}

#[cfg(test)]
mod tests {
    use super::{Groups, Level, NibbleRows, round};

    #[test]
    fn groups_are_rounded_to_codes_that_are_off_by_half_a_scale_at_most() {
        let values: Vec<f32> = (0..64_u32).map(|i| ((i * 37 % 101) as f32 - 30.0) / 50.0).collect();
        for zeros in [0, 4] {
            let (mut codes, mut scales, mut zeros) = (vec![99; 64], vec![0.0; 4], vec![77; zeros]);
            round(
                Level::detected(),
                &values,
                32,
                2,
                &mut NibbleRows { codes: &mut codes, scales: &mut scales, zeros: &mut zeros },
            );
            for (at, (&code, &value)) in codes.iter().zip(&values).enumerate() {
                let place = at / 16;
                let zero = zeros.get(place).map_or(8.0, |&zero| f32::from(zero));
                let error = (f32::from(code) - zero) * scales[place] - value;
                assert!(error.abs() <= scales[place] * 0.5001, "{value} became {error} more");
            }
        }
    }

    #[test]
    fn groups_that_kernels_do_not_take_become_smaller_ones() {
        for (group, inputs, expected) in
            [(32, 64, (32, 1)), (100, 100, (104, 1)), (16_384, 32_768, (8_192, 2)), (24_576, 24_576, (8_192, 3))]
        {
            let groups = Groups::of(group, inputs).unwrap();
            assert_eq!((groups.group, groups.repeats), expected);
        }
        assert!(Groups::of(20, 40).is_err());
    }
}
