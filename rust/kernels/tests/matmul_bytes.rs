//! Products of 8-bit weights against the same arithmetic in scalar code, bit for bit, at every level and odd size.
#![allow(missing_docs, reason = "a test binary")]

mod support;

use llmscale_kernels::dispatch::Level;
use llmscale_kernels::element::{Bf16, Element};
use llmscale_kernels::matmul::MatmulScratch;
use llmscale_kernels::matmul::bytes::{PackedBytes, multiply_bytes};
use proptest::prelude::*;
use support::{Random, pool};

struct Case<T> {
    inputs: usize,
    outputs: usize,
    input: Vec<T>,
    codes: Vec<i8>,
    scales: Vec<f32>,
    bias: Vec<T>,
}

impl<T: Element> Case<T> {
    fn new(rows: usize, outputs: usize, inputs: usize, seed: u64) -> Self {
        let mut random = Random(seed);
        // Checkpoints may hold -128, too.
        let codes = (0..outputs * inputs).map(|_| random.next() as i8).collect();
        let scales = (0..outputs).map(|_| random.signed().abs() * 0.01).collect();
        let mut input: Vec<T> = random.elements(rows * inputs);
        if rows > 1 {
            input[..inputs].fill(T::default());
        }
        Self { inputs, outputs, input, codes, scales, bias: random.elements(outputs) }
    }

    fn packed(&self) -> PackedBytes {
        PackedBytes::pack(&pool(2), &self.codes, &self.scales, self.outputs, self.inputs).unwrap()
    }

    fn multiply(&self, level: Level, threads: usize, input: &[T], biased: bool) -> Vec<T> {
        let pool = pool(threads);
        let (packed, mut scratch) = (self.packed(), MatmulScratch::default());
        // What a product before has left must not matter.
        let dirt = vec![T::from_f32(9.0); 7 * self.inputs];
        multiply_bytes(&pool, level, &mut scratch, &dirt[..], &packed, None, &mut vec![T::default(); 7 * self.outputs])
            .unwrap();
        let mut output = vec![T::from_f32(f32::NAN); input.len() / self.inputs * self.outputs];
        let bias = biased.then_some(self.bias.as_slice());
        multiply_bytes(&pool, level, &mut scratch, input, &packed, bias, &mut output).unwrap();
        output
    }

    /// One row in scalar code.
    fn expected(&self, row: &[T], biased: bool) -> Vec<T> {
        let largest = row.iter().fold(0.0_f32, |largest, value| largest.max(value.to_f32().abs()));
        let factor = 127.0 / largest.max(1e-36);
        let codes: Vec<i64> = row.iter().map(|value| (value.to_f32() * factor).round_ties_even() as i64).collect();
        (0..self.outputs)
            .map(|output| {
                let weights = &self.codes[output * self.inputs..][..self.inputs];
                let sum: i64 = codes.iter().zip(weights).map(|(&code, &weight)| code * i64::from(weight)).sum();
                let value = sum as f32 * self.scales[output] * (largest / 127.0);
                T::from_f32(if biased { value + self.bias[output].to_f32() } else { value })
            })
            .collect()
    }

    fn check(&self, threads: usize) {
        for level in Level::available() {
            for biased in [false, true] {
                let together = self.multiply(level, threads, &self.input, biased);
                for (row, given) in self.input.chunks(self.inputs).zip(together.chunks(self.outputs)) {
                    let expected = self.expected(row, biased);
                    let same = given.iter().zip(&expected).all(|(a, b)| a.to_f32().to_bits() == b.to_f32().to_bits());
                    assert!(same, "{level}: {given:?} for {expected:?}");
                }
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn products_have_the_bits_of_the_scalar_arithmetic(
        rows in 1_usize..30,
        outputs in 1_usize..100,
        inputs in 1_usize..200,
        threads in 1_usize..4,
        seed in any::<u64>(),
    ) {
        Case::<Bf16>::new(rows, outputs, inputs, seed).check(threads);
        Case::<f32>::new(rows, outputs, inputs, seed).check(threads);
    }

    #[test]
    fn rows_of_a_table_are_its_codes_times_their_scale(
        outputs in 1_usize..100,
        inputs in 1_usize..200,
        ids in prop::collection::vec(0_usize..100, 0..9),
        seed in any::<u64>(),
    ) {
        let case = Case::<Bf16>::new(1, outputs, inputs, seed);
        let ids: Vec<i32> = ids.into_iter().map(|id| (id % outputs) as i32).collect();
        let mut rows = vec![Bf16::default(); ids.len() * inputs];
        case.packed().gather(&pool(2), &ids, &mut rows).unwrap();
        for (&id, row) in ids.iter().zip(rows.chunks(inputs)) {
            let (codes, scale) = (&case.codes[id as usize * inputs..][..inputs], case.scales[id as usize]);
            let expected: Vec<Bf16> = codes.iter().map(|&code| Bf16::from_f32(f32::from(code) * scale)).collect();
            prop_assert_eq!(row, expected);
        }
        prop_assert!(case.packed().gather(&pool(1), &[outputs as i32], &mut vec![Bf16::default(); inputs]).is_err());
    }
}

#[test]
fn a_row_that_is_not_a_number_gives_none() {
    let mut case = Case::<Bf16>::new(3, 40, 300, 9);
    case.input[305] = Bf16::from_f32(f32::NAN);
    for level in Level::available() {
        let products = case.multiply(level, 2, &case.input, false);
        for (row, products) in products.chunks(40).enumerate() {
            assert!(products.iter().all(|value| value.to_f32().is_nan() == (row == 1)), "{level}: {products:?}");
        }
    }
}

#[test]
fn several_blocks_of_rows_and_chunks_of_panels_cover_everything_once() {
    Case::<Bf16>::new(400, 70, 130, 3).check(3);
    Case::<Bf16>::new(2, 5_000, 300, 4).check(2);
}

#[test]
fn sums_that_do_not_fit_are_refused_and_the_largest_that_do_are_exact() {
    let most = 1 << 16;
    let shared = pool(1);
    let refused = PackedBytes::pack(&shared, &vec![0; most + 1], &[1.0], 1, most + 1).unwrap_err().to_string();
    assert!(refused.contains("at most 65536"), "{refused}");
    for weight in [i8::MIN, i8::MAX] {
        let case = Case {
            inputs: most,
            outputs: 1,
            input: vec![1.0_f32; most],
            codes: vec![weight; most],
            scales: vec![1.0],
            bias: vec![0.0],
        };
        case.check(1);
    }
}

#[test]
fn a_row_that_is_not_finite_spoils_itself_alone() {
    let mut case = Case::<f32>::new(4, 40, 50, 5);
    case.input[50 + 7] = f32::NAN;
    case.input[100 + 9] = f32::INFINITY;
    for level in Level::available() {
        let given = case.multiply(level, 2, &case.input, false);
        assert!(given[40..120].iter().all(|value| !value.is_finite()), "{level}");
        let expected = case.expected(&case.input[150..], false);
        assert!(given[120..].iter().zip(&expected).all(|(a, b)| a.to_bits() == b.to_bits()), "{level}");
    }
}

#[test]
fn shapes_that_do_not_fit_are_refused_before_anything_is_written() {
    let shared = pool(1);
    let level = Level::detected();
    assert!(PackedBytes::pack(&shared, &[1; 6], &[1.0; 2], 2, 4).is_err());
    assert!(PackedBytes::pack(&shared, &[1; 8], &[1.0; 3], 2, 4).is_err());
    let packed = PackedBytes::pack(&shared, &[1; 8], &[1.0; 2], 2, 4).unwrap();
    let (mut scratch, mut output) = (MatmulScratch::default(), [7.0; 2]);
    assert!(multiply_bytes(&shared, level, &mut scratch, &[1.0_f32; 5][..], &packed, None, &mut output).is_err());
    assert!(multiply_bytes(&shared, level, &mut scratch, &[1.0_f32; 8][..], &packed, None, &mut output).is_err());
    assert!(output.iter().all(|value| value.to_bits() == 7.0_f32.to_bits()));
}
