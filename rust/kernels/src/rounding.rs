//! Dense weights to the nearest codes of eight and four bits, as they are quantized while a model is loaded. Numbers are
//! those of `llmscale quantize`, at every level: each is one division and one rounding. Linear in the weights; knows
//! nothing of where they come from or lie. Kernels for the sake of the instructions that they are compiled for: without
//! them rounding is a call of the C library, and was half of what loading a model took.

use crate::dispatch::{Kernel, Level};
use crate::simd::Simd;

/// Codes of eight bits lie between minus this and this.
const MAX_BYTE: f32 = 127.0;
/// The greatest code of four bits.
const MAX_NIBBLE: f32 = 15.0;
/// The code of zero where a group has no zero point.
const MIDDLE: f32 = 8.0;
/// Least divisor, so that rows of zeros have codes of zero.
const LEAST_DIVISOR: f32 = 1e-36;

/// Fills `codes` with the row's, and returns their scale, which is no finite number where one of the row's is not.
pub fn round_to_bytes(level: Level, row: &[f32], codes: &mut [i8]) -> f32 {
    level.run(Bytes { row, codes })
}

/// Fills `codes` with a group's, from 0 to 15, and returns their scale, a bf16, and the code of zero. The scale is raised
/// to the next bf16 before codes are chosen, so that no weight is off by more than half of it. A symmetric group has no
/// zero point: its code of zero is 8. Where a value is no finite number the scale is none either.
pub fn round_to_nibbles(level: Level, values: &[f32], is_symmetric: bool, codes: &mut [u8]) -> (f32, u8) {
    level.run(Nibbles { values, is_symmetric, codes })
}

struct Bytes<'a> {
    row: &'a [f32],
    codes: &'a mut [i8],
}

impl Kernel for Bytes<'_> {
    type Output = f32;

    #[inline(always)]
    fn run<S: Simd>(self, _: S) -> f32 {
        let scale = largest_of(self.row) / MAX_BYTE;
        let divisor = scale.max(LEAST_DIVISOR);
        for (code, value) in self.codes.iter_mut().zip(self.row) {
            *code = (value / divisor).round_ties_even().clamp(-MAX_BYTE, MAX_BYTE) as i8;
        }
        scale
    }
}

struct Nibbles<'a> {
    values: &'a [f32],
    is_symmetric: bool,
    codes: &'a mut [u8],
}

impl Kernel for Nibbles<'_> {
    type Output = (f32, u8);

    #[inline(always)]
    fn run<S: Simd>(self, _: S) -> (f32, u8) {
        let largest = largest_of(self.values);
        if !largest.is_finite() {
            return (largest, MIDDLE as u8);
        }
        let (scale, zero) = if self.is_symmetric {
            (raised_to_bf16(largest / (MAX_NIBBLE / 2.0)), MIDDLE)
        } else {
            let low = self.values.iter().fold(0.0_f32, |low, value| low.min(*value));
            let high = self.values.iter().fold(0.0_f32, |high, value| high.max(*value));
            let scale = raised_to_bf16((high - low) / MAX_NIBBLE);
            (scale, (-low / scale.max(LEAST_DIVISOR)).round_ties_even().clamp(0.0, MAX_NIBBLE))
        };
        let divisor = scale.max(LEAST_DIVISOR);
        for (code, value) in self.codes.iter_mut().zip(self.values) {
            *code = ((value / divisor).round_ties_even() + zero).clamp(0.0, MAX_NIBBLE) as u8;
        }
        (scale, zero as u8)
    }
}

/// The greatest magnitude, in sixteen chains, which become vectors where one would not. Bits of magnitudes have the order
/// of the numbers, with infinity and what is no number behind them: a maximum of floats would pass those over.
#[inline(always)]
fn largest_of(values: &[f32]) -> f32 {
    const CHAINS: usize = 16;
    let magnitude = |value: &f32| value.to_bits() & 0x7fff_ffff;
    let mut chains = [0_u32; CHAINS];
    let whole = values.chunks_exact(CHAINS);
    let rest = whole.remainder();
    for values in whole {
        for (largest, value) in chains.iter_mut().zip(values) {
            *largest = magnitude(value).max(*largest);
        }
    }
    f32::from_bits(rest.iter().map(magnitude).chain(chains).fold(0, u32::max))
}

/// The next bf16 that is not less, for numbers that are not negative.
#[inline(always)]
fn raised_to_bf16(scale: f32) -> f32 {
    f32::from_bits(scale.to_bits().wrapping_add(0xffff) & 0xffff_0000)
}

#[cfg(test)]
mod tests {
    use super::{Bytes, Nibbles, raised_to_bf16};
    use crate::dispatch::Level;

    fn values(count: usize) -> Vec<f32> {
        // Ties, zeros of both signs and one great value among small ones.
        (0..count).map(|at| ((at * 37 % 101) as f32 - 50.0) * if at == 7 { 3.0 } else { 0.5 }).collect()
    }

    #[test]
    fn codes_are_the_same_at_every_level_and_no_further_than_half_a_scale() {
        for count in [1, 7, 16, 31, 32, 33, 64, 100, 576] {
            let values = values(count);
            let (mut expected, mut expected_nibbles) = (None, None);
            for level in Level::available() {
                let mut codes = vec![0; count];
                let scale = level.run(Bytes { row: &values, codes: &mut codes });
                for (code, value) in codes.iter().zip(&values) {
                    assert!((f32::from(*code) * scale - value).abs() <= 0.5 * scale * 1.0001, "{level}");
                }
                assert_eq!(*expected.get_or_insert((scale, codes.clone())), (scale, codes), "{level}");
                for is_symmetric in [true, false] {
                    let mut codes = vec![0; count];
                    let (scale, zero) = level.run(Nibbles { values: &values, is_symmetric, codes: &mut codes });
                    for (code, value) in codes.iter().zip(&values) {
                        let near = (f32::from(*code) - f32::from(zero)) * scale;
                        assert!((near - value).abs() <= 0.5001 * scale, "{level}");
                    }
                    let known = expected_nibbles.get_or_insert([None, None]);
                    let known = known[usize::from(is_symmetric)].get_or_insert((scale, zero, codes.clone()));
                    assert_eq!(*known, (scale, zero, codes), "{level}");
                }
            }
        }
    }

    #[test]
    fn zeros_have_codes_of_zero() {
        let zeros = [0.0; 40];
        let mut codes = [1; 40];
        assert!(super::round_to_bytes(Level::detected(), &zeros, &mut codes) <= 0.0);
        assert_eq!(codes, [0; 40]);
        let mut codes = [1; 40];
        let (scale, zero) = super::round_to_nibbles(Level::detected(), &zeros, false, &mut codes);
        assert!(scale <= 0.0);
        assert_eq!(codes, [zero; 40]);
    }

    #[test]
    fn what_is_no_finite_number_has_no_finite_scale() {
        for broken in [f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::from_bits(0x7fff_ffff)] {
            for at in [0, 17, 39] {
                let mut values = values(40);
                values[at] = broken;
                for level in Level::available() {
                    assert!(!super::round_to_bytes(level, &values, &mut [0; 40]).is_finite(), "{level}");
                    for is_symmetric in [true, false] {
                        let (scale, _) = super::round_to_nibbles(level, &values, is_symmetric, &mut [0; 40]);
                        assert!(!scale.is_finite(), "{level}");
                    }
                }
            }
        }
    }

    #[test]
    fn scales_are_raised_to_the_next_bf16() {
        for (given, raised) in [(1.0, 1.0), (1.0001, 1.007_812_5), (0.0, 0.0)] {
            assert!((raised_to_bf16(given) - raised).abs() < 1e-9, "{given}");
        }
    }
}
