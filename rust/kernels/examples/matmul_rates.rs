//! Products of packed weights at every number of rows that serving has: GB/s of weights and GFLOP/s.
//! `cargo run --release -p llmscale-kernels --example matmul_rates [threads] [level]`; give it an idle machine.
#![allow(clippy::print_stdout, missing_docs, reason = "the example prints a table")]

use llmscale_kernels::dispatch::Level;
use llmscale_kernels::element::Bf16;
use llmscale_kernels::matmul::{PackedWeights, multiply};
use llmscale_kernels::pool::Pool;
use std::num::NonZeroUsize;
use std::time::Instant;

fn main() {
    let mut arguments = std::env::args().skip(1);
    let threads = arguments.next().map_or(2, |text| text.parse().expect("a number of threads"));
    let level = Level::from_environment(arguments.next().as_deref()).expect("a level of this machine");
    let pool = Pool::new(NonZeroUsize::new(threads).expect("at least one thread")).expect("threads can be started");
    let noise: Vec<Bf16> =
        (0..1_u32 << 20).map(|i| Bf16::from_f32((i.wrapping_mul(2_654_435_761) >> 8) as f32 / 8e6 - 1.0)).collect();
    for (outputs, inputs) in [(960, 576), (3_072, 576), (576, 1_536), (2_048, 2_048), (16_384, 2_048), (2_048, 8_192)] {
        let copies = ((256 << 20) / (2 * outputs * inputs)).max(1);
        let source: Vec<Bf16> = (0..outputs * inputs).map(|i| noise[i & 0xf_ffff]).collect();
        let weights: Vec<_> =
            (0..copies).map(|_| PackedWeights::pack(&pool, &source, outputs, inputs).expect("it fits")).collect();
        for rows in [1, 2, 4, 8, 16, 32, 64, 512] {
            let input: Vec<Bf16> = (0..rows * inputs).map(|i| noise[(i * 7) & 0xf_ffff]).collect();
            let mut output = vec![Bf16::default(); rows * outputs];
            let mut rates = Vec::new();
            let used = if rows >= 64 { (copies / rows * 8).max(1) } else { copies };
            for _ in 0..7 {
                let start = Instant::now();
                for weights in &weights[..used] {
                    multiply(&pool, level, &input, weights, None, &mut output).expect("shapes fit");
                }
                rates.push(start.elapsed().as_secs_f64() / used as f64);
            }
            rates.sort_by(f64::total_cmp);
            let seconds = rates[rates.len() / 2];
            println!(
                "{outputs:6} x {inputs:5}, {rows:4} rows: {:8.1} us {:7.1} GB/s {:7.1} GFLOP/s (best {:.1})",
                seconds * 1e6,
                (2 * outputs * inputs) as f64 / seconds / 1e9,
                (2 * rows * outputs * inputs) as f64 / seconds / 1e9,
                (2 * rows * outputs * inputs) as f64 / rates[0] / 1e9,
            );
        }
    }
}
