//! Products of 4-bit weights against sums in f64 over the same codes, at every level and odd size, and the same bits
//! whatever lies beside a row.
#![allow(missing_docs, reason = "a test binary")]

mod support;

use llmscale_kernels::dispatch::Level;
use llmscale_kernels::element::{Bf16, Element};
use llmscale_kernels::matmul::MatmulScratch;
use llmscale_kernels::matmul::nibbles::{PackedNibbles, multiply_nibbles, unpack};
use proptest::prelude::*;
use support::{Random, pool};

struct Case<T> {
    inputs: usize,
    outputs: usize,
    group: usize,
    input: Vec<T>,
    codes: Vec<u8>,
    scales: Vec<f32>,
    /// Empty where all are 8.
    zeros: Vec<u8>,
    bias: Vec<T>,
}

impl<T: Element> Case<T> {
    fn new((rows, outputs, inputs): (usize, usize, usize), group: usize, has_zeros: bool, seed: u64) -> Self {
        let mut random = Random(seed);
        let groups = inputs.div_ceil(group);
        let codes = (0..outputs * inputs).map(|_| random.next() as u8 & 15).collect();
        let exact = |value: f32| if seed.is_multiple_of(2) { Bf16::from_f32(value).to_f32() } else { value };
        let scales = (0..outputs * groups).map(|_| exact(random.signed() * 0.01)).collect();
        let zeros = (0..if has_zeros { outputs * groups } else { 0 }).map(|_| random.next() as u8 & 15).collect();
        let mut input: Vec<T> = random.elements(rows * inputs);
        if rows > 1 {
            input[..inputs].fill(T::default());
        }
        Self { inputs, outputs, group, input, codes, scales, zeros, bias: random.elements(outputs) }
    }

    fn packed(&self) -> PackedNibbles {
        let groups = self.inputs.div_ceil(self.group);
        PackedNibbles::read(&pool(2), (self.outputs, self.inputs), self.group, !self.zeros.is_empty(), |first, rows| {
            rows.codes.copy_from_slice(&self.codes[first * self.inputs..][..rows.codes.len()]);
            rows.scales.copy_from_slice(&self.scales[first * groups..][..rows.scales.len()]);
            if !self.zeros.is_empty() {
                rows.zeros.copy_from_slice(&self.zeros[first * groups..][..rows.zeros.len()]);
            }
            Ok(())
        })
        .unwrap()
    }

    fn multiply(&self, packed: &PackedNibbles, level: Level, threads: usize, input: &[T]) -> Vec<T> {
        let (pool, mut scratch) = (pool(threads), MatmulScratch::default());
        let mut output = vec![T::from_f32(f32::NAN); input.len() / self.inputs * self.outputs];
        multiply_nibbles(&pool, level, &mut scratch, input, packed, Some(&self.bias), &mut output).unwrap();
        output
    }

    /// Each result over the codes of a row, and the sum of magnitudes that bounds its rounding.
    fn expected(&self, row: &[T]) -> Vec<(f64, f64)> {
        let groups = self.inputs.div_ceil(self.group);
        let largest = row.iter().fold(0.0_f32, |largest, value| largest.max(value.to_f32().abs()));
        let factor = 127.0 / largest.max(1e-36);
        let codes: Vec<f64> = row.iter().map(|value| f64::from((value.to_f32() * factor).round_ties_even())).collect();
        let row_scale = f64::from(largest / 127.0);
        (0..self.outputs)
            .map(|output| {
                let bias = f64::from(self.bias[output].to_f32());
                (0..self.inputs).fold((bias, bias.abs()), |(sum, size), at| {
                    let place = output * groups + at / self.group;
                    let zero = self.zeros.get(place).copied().unwrap_or(8);
                    let code = f64::from(self.codes[output * self.inputs + at]) - f64::from(zero);
                    let product = codes[at] * code * f64::from(self.scales[place]) * row_scale;
                    (sum + product, size + product.abs())
                })
            })
            .collect()
    }

    fn check(&self, threads: usize) {
        let packed = self.packed();
        for level in Level::available() {
            let together = self.multiply(&packed, level, threads, &self.input);
            for (row, given) in self.input.chunks(self.inputs).zip(together.chunks(self.outputs)) {
                for (output, (value, (sum, size))) in given.iter().zip(self.expected(row)).enumerate() {
                    let step = if T::IS_BF16 { 1.0 / 256.0 } else { 0.0 };
                    let bound = sum.abs() * step + size * 1e-6 + 1e-30;
                    let value = f64::from(value.to_f32());
                    assert!((value - sum).abs() <= bound, "{level} [{output}]: {value} for {sum}");
                }
                let alone = self.multiply(&packed, level, 1, row);
                let same = alone.iter().zip(given).all(|(a, b)| a.to_f32().to_bits() == b.to_f32().to_bits());
                assert!(same, "a row has other bits alone, at {level}");
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]
    #[test]
    fn products_are_the_exact_sums_of_codes_up_to_rounding(
        rows in 1_usize..20,
        outputs in 1_usize..80,
        inputs in 1_usize..300,
        group in 1_usize..9,
        has_zeros in any::<bool>(),
        threads in 1_usize..4,
        seed in any::<u64>(),
    ) {
        Case::<Bf16>::new((rows, outputs, inputs), group * 8, has_zeros, seed).check(threads);
        Case::<f32>::new((rows, outputs, inputs), group * 32, has_zeros, seed).check(threads);
    }
}

#[test]
fn the_largest_group_is_exact_and_larger_ones_are_refused() {
    let mut case = Case::<f32>::new((1, 3, 8_192), 8_192, true, 4);
    case.input.fill(1.0);
    case.codes.fill(15);
    case.zeros.fill(0);
    case.check(1);
    for group in [0, 12, 8_200] {
        let refused = PackedNibbles::read(&pool(1), (1, 16), group, false, |_, _| Ok(())).unwrap_err().to_string();
        assert!(refused.contains("a multiple of 8 up to 8192"), "{refused}");
    }
}

#[test]
fn stored_codes_come_two_to_a_byte_the_even_one_in_the_low_half() {
    let mut codes = [0; 5];
    unpack(&[0x21, 0x43, 0x05], &mut codes).unwrap();
    assert_eq!(codes, [1, 2, 3, 4, 5]);
    assert!(unpack(&[1, 2], &mut codes).is_err());
}
