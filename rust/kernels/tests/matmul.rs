//! Products of packed weights against sums in f64, at every level and odd size, and the same bits whatever lies beside a
//! row and however many threads share the work.
#![allow(missing_docs, reason = "a test binary")]

mod support;

use llmscale_kernels::dispatch::Level;
use llmscale_kernels::element::{Bf16, Element};
use llmscale_kernels::matmul::dense::{PackedWeights, multiply};
use llmscale_kernels::matmul::{MatmulScratch, PackError};
use proptest::prelude::*;
use support::{Random, pool};

struct Case<T> {
    inputs: usize,
    outputs: usize,
    /// `rows x inputs`.
    input: Vec<T>,
    weights: Vec<T>,
    bias: Vec<T>,
}

impl<T: Element> Case<T> {
    fn new(rows: usize, outputs: usize, inputs: usize, seed: u64) -> (Self, PackedWeights<T>) {
        let mut random = Random(seed);
        let weights = random.elements(outputs * inputs);
        let packed = PackedWeights::pack(&pool(2), &weights, outputs, inputs).unwrap();
        assert_eq!((packed.outputs(), packed.inputs()), (outputs, inputs));
        let input = random.elements(rows * inputs);
        (Self { inputs, outputs, input, weights, bias: random.elements(outputs) }, packed)
    }

    fn multiply(&self, packed: &PackedWeights<T>, level: Level, threads: usize, input: &[T], biased: bool) -> Vec<T> {
        let rows = input.len() / self.inputs;
        let mut output = vec![T::from_f32(f32::NAN); rows * self.outputs];
        let bias = biased.then_some(self.bias.as_slice());
        let (pool, mut scratch) = (pool(threads), MatmulScratch::default());
        // What a product before has left must not matter.
        let other = PackedWeights::pack(&pool, &[T::from_f32(9.0); 66 * 5], 5, 66).unwrap();
        let dirt = [T::from_f32(f32::NAN); 7 * 66];
        multiply(&pool, level, &mut scratch, &dirt[..], &other, None, &mut [T::default(); 35]).unwrap();
        multiply(&pool, level, &mut scratch, input, packed, bias, &mut output).unwrap();
        output
    }

    /// Each sum, and the sum of magnitudes that bounds its rounding.
    fn exact(&self, row: usize, output: usize, biased: bool) -> (f64, f64) {
        let products = (0..self.inputs).map(|at| {
            f64::from(self.input[row * self.inputs + at].to_f32())
                * f64::from(self.weights[output * self.inputs + at].to_f32())
        });
        let bias = if biased { f64::from(self.bias[output].to_f32()) } else { 0.0 };
        products.fold((bias, bias.abs()), |(sum, size), product| (sum + product, size + product.abs()))
    }

    fn check(&self, packed: &PackedWeights<T>, level: Level, biased: bool) {
        let given = self.multiply(packed, level, 2, &self.input, biased);
        for row in 0..self.input.len() / self.inputs {
            for output in 0..self.outputs {
                let (sum, size) = self.exact(row, output, biased);
                let value = f64::from(given[row * self.outputs + output].to_f32());
                // Half a step of the result's format, and a rounding of f32 per sum.
                let step = if T::IS_BF16 { 1.0 / 256.0 } else { 0.0 };
                let tolerance = sum.abs() * step + size * f64::from(f32::EPSILON) * self.inputs as f64 + 1e-30;
                assert!((value - sum).abs() <= tolerance, "{level} [{row}, {output}]: {value} for {sum}");
            }
        }
    }
}

fn check_all<T: Element>(rows: usize, outputs: usize, inputs: usize) {
    let (case, packed) = Case::<T>::new(rows, outputs, inputs, (rows * 1_000 + outputs) as u64);
    for level in Level::available() {
        case.check(&packed, level, false);
        case.check(&packed, level, true);
    }
}

#[test]
fn products_of_any_shape_are_the_exact_sums_up_to_rounding() {
    for (rows, outputs, inputs) in
        [(1, 1, 1), (1, 33, 3), (2, 31, 17), (5, 32, 64), (12, 65, 48), (13, 100, 321), (25, 7, 500), (193, 40, 10)]
    {
        check_all::<f32>(rows, outputs, inputs);
        check_all::<Bf16>(rows, outputs, inputs);
    }
}

fn check_invariance<T: Element>(rows: usize, outputs: usize, inputs: usize, seed: u64) {
    let (case, packed) = Case::<T>::new(rows, outputs, inputs, seed);
    for level in Level::available() {
        let together = case.multiply(&packed, level, 3, &case.input, true);
        for (row, expected) in together.chunks(outputs).enumerate() {
            let alone = case.multiply(&packed, level, 1, &case.input[row * inputs..][..inputs], true);
            assert!(
                alone.iter().zip(expected).all(|(a, b)| a.to_f32().to_bits() == b.to_f32().to_bits()),
                "row {row} of {rows} has other bits alone, at {level}"
            );
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn a_row_has_the_same_bits_alone_and_among_others(
        rows in 1_usize..40,
        outputs in 1_usize..150,
        inputs in 1_usize..200,
        seed in any::<u64>(),
    ) {
        check_invariance::<Bf16>(rows, outputs, inputs, seed);
        check_invariance::<f32>(rows, outputs, inputs, seed);
    }
}

#[test]
fn several_blocks_of_rows_and_chunks_of_panels_cover_everything_once() {
    // 400 rows are three blocks, 5,000 outputs many chunks.
    check_invariance::<Bf16>(400, 130, 70, 3);
    check_invariance::<Bf16>(2, 5_000, 300, 4);
}

#[test]
fn rows_of_a_table_are_those_that_were_packed() {
    let (case, packed) = Case::<Bf16>::new(1, 70, 33, 9);
    let shared = pool(2);
    let ids = [69, 0, 31, 32, 5];
    let mut rows = vec![Bf16::default(); ids.len() * 33];
    packed.gather(&shared, &ids, &mut rows).unwrap();
    for (row, id) in rows.chunks(33).zip(ids) {
        assert_eq!(row, &case.weights[id as usize * 33..][..33]);
    }
    let (floats, packed) = Case::<f32>::new(1, 5, 7, 9);
    let mut row = [0.0; 7];
    packed.gather(&shared, &[4], &mut row).unwrap();
    assert!(row.iter().zip(&floats.weights[28..]).all(|(a, b)| a.to_bits() == b.to_bits()));
    for wrong in [-1, 5] {
        assert!(packed.gather(&shared, &[wrong], &mut row).is_err());
    }
    assert!(packed.gather(&shared, &[1, 2], &mut row).is_err());
}

#[test]
fn weights_that_cannot_be_read_are_an_error_that_says_so() {
    let read = |first: usize, _: &mut [f32]| {
        if first == 0 { Ok(()) } else { Err(std::io::Error::other("the file ends here")) }
    };
    let Err(error) = PackedWeights::read(&pool(2), 100, 8, read) else { panic!("it was packed") };
    assert!(error.to_string().contains("the file ends here"), "{error}");
}

#[test]
fn shapes_that_do_not_fit_are_refused_before_anything_is_written() {
    let shared = pool(1);
    let refused = PackedWeights::pack(&shared, &[1.0_f32; 6], 2, 4).unwrap_err().to_string();
    assert!(refused.contains("`weights` holds 6 elements, the shapes require 8"), "{refused}");
    assert!(matches!(PackedWeights::<f32>::pack(&shared, &[], 0, 4), Err(PackError::Kernel(_))));
    let packed = PackedWeights::pack(&shared, &[1.0_f32; 8], 2, 4).unwrap();
    let mut output = [7.0; 2];
    let level = Level::detected();
    let mut scratch = MatmulScratch::default();
    assert!(multiply(&shared, level, &mut scratch, &[1.0; 5][..], &packed, None, &mut output).is_err());
    assert!(multiply(&shared, level, &mut scratch, &[1.0; 8][..], &packed, None, &mut output).is_err());
    assert!(multiply(&shared, level, &mut scratch, &[1.0; 4][..], &packed, Some(&[1.0]), &mut output).is_err());
    assert!(output.iter().all(|value| value.to_bits() == 7.0_f32.to_bits()));
    multiply(&shared, level, &mut scratch, &[][..], &packed, None, &mut []).unwrap();
}
