//! Products of packed weights at every number of rows that serving has: GB/s of weights and GFLOP/s.
//! `cargo run --release -p llmscale-kernels --example matmul_rates [threads] [level] [matrix]`, such
//! as `2 avx512 2048x8192`; give it an idle machine.
#![allow(clippy::print_stdout, missing_docs, reason = "the example prints a table")]

use llmscale_kernels::dispatch::Level;
use llmscale_kernels::element::Bf16;
use llmscale_kernels::matmul::MatmulScratch;
use llmscale_kernels::matmul::bytes::{PackedBytes, multiply_bytes};
use llmscale_kernels::matmul::dense::{PackedWeights, multiply};
use llmscale_kernels::pool::Pool;
use std::num::NonZeroUsize;
use std::time::Instant;

const SHAPES: [(usize, usize); 6] =
    [(960, 576), (3_072, 576), (576, 1_536), (2_048, 2_048), (16_384, 2_048), (2_048, 8_192)];
const ROWS: [usize; 8] = [1, 2, 4, 8, 16, 32, 64, 512];

/// Seconds of one product with each of `copies` weights, the median and the best of seven rounds.
fn seconds(copies: usize, mut product: impl FnMut(usize)) -> (f64, f64) {
    let mut rounds: Vec<f64> = (0..7)
        .map(|_| {
            let start = Instant::now();
            (0..copies).for_each(&mut product);
            start.elapsed().as_secs_f64() / copies as f64
        })
        .collect();
    rounds.sort_by(f64::total_cmp);
    (rounds[rounds.len() / 2], rounds[0])
}

fn print(name: &str, shape: (usize, usize, usize), bytes: usize, (median, best): (f64, f64)) {
    let (rows, outputs, inputs) = shape;
    let operations = (2 * rows * outputs * inputs) as f64;
    println!(
        "{name} {outputs:6} x {inputs:5}, {rows:4} rows: {:8.1} us {:6.1} GB/s {:7.1} GOP/s (best {:.1})",
        median * 1e6,
        bytes as f64 / median / 1e9,
        operations / median / 1e9,
        operations / best / 1e9,
    );
}

fn main() {
    let mut arguments = std::env::args().skip(1);
    let threads = arguments.next().map_or(2, |text| text.parse().expect("a number of threads"));
    let level = Level::from_environment(arguments.next().as_deref()).expect("a level of this machine");
    let wanted = arguments.next();
    let pool = Pool::new(NonZeroUsize::new(threads).expect("at least one thread")).expect("threads can be started");
    let noise = |at: usize| (at as u32).wrapping_mul(2_654_435_761) >> 8;
    let is_wanted = |(outputs, inputs)| wanted.as_deref().is_none_or(|matrix| matrix == format!("{outputs}x{inputs}"));
    for (outputs, inputs) in SHAPES.into_iter().filter(|&shape| is_wanted(shape)) {
        // More than a cache holds.
        let copies = ((256 << 20) / (2 * outputs * inputs)).max(1);
        let floats: Vec<Bf16> = (0..outputs * inputs).map(|i| Bf16::from_f32(noise(i) as f32 / 8e6 - 1.0)).collect();
        let codes: Vec<i8> = (0..outputs * inputs).map(|i| noise(i) as i8).collect();
        let dense: Vec<_> =
            (0..copies).map(|_| PackedWeights::pack(&pool, &floats, outputs, inputs).expect("it fits")).collect();
        let scales = vec![0.01; outputs];
        let bytes: Vec<_> =
            (0..copies).map(|_| PackedBytes::pack(&pool, &codes, &scales, outputs, inputs).expect("it fits")).collect();
        for rows in ROWS {
            let input: Vec<Bf16> = (0..rows * inputs).map(|i| floats[i * 7 % floats.len()]).collect();
            let mut output = vec![Bf16::default(); rows * outputs];
            let mut scratch = MatmulScratch::default();
            let used = if rows >= 64 { (copies / rows * 8).max(1) } else { copies };
            let shape = (rows, outputs, inputs);
            let took = seconds(used, |copy| {
                multiply(&pool, level, &mut scratch, &input[..], &dense[copy], None, &mut output).expect("shapes fit");
            });
            print("bf16", shape, dense[0].bytes(), took);
            let took = seconds(used, |copy| {
                multiply_bytes(&pool, level, &mut scratch, &input[..], &bytes[copy], None, &mut output)
                    .expect("shapes fit");
            });
            print("int8", shape, bytes[0].bytes(), took);
        }
    }
}
