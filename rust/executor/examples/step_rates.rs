//! Whole steps of a random model, without a scheduler or an interpreter: tokens per second of prompts and of decodes.
//! `cargo run --release -p llmscale-executor --example step_rates [shape] [scheme] [threads] [cases]`; give it an idle machine.
#![allow(clippy::print_stdout, missing_docs, reason = "the example prints a table")]

use llmscale_executor::description::{
    AttentionDescription, BlockDescription, LinearDescription, ModelShape, NormDescription, ProgramLimits,
    RopeDescription, WeightSource,
};
use llmscale_executor::linear::Processor;
use llmscale_executor::program::{Program, ProgramBuilder, StepRows};
use llmscale_executor::source::{Stack, Stored, Tensor, TensorFile};
use llmscale_kernels::dispatch::Level;
use llmscale_kernels::element::Bf16;
use llmscale_kernels::kv_format::KvFormat;
use llmscale_kernels::paged_attention::AttentionBatch;
use llmscale_kernels::pool::Pool;
use std::io::Write;
use std::num::NonZeroUsize;
use std::sync::Arc;
use std::time::Instant;

const BLOCK_TOKENS: usize = 32;
const CONTEXT: usize = 256;
const ROUNDS: usize = 7;
const GROUP: usize = 32;

/// Layers, hidden, heads, key-value heads, inner width, vocabulary.
type Shape = (usize, usize, usize, usize, usize, usize);
const SHAPES: [(&str, Shape); 5] = [
    ("S", (30, 576, 9, 3, 1_536, 49_152)),
    ("M", (24, 896, 14, 2, 4_864, 32_000)),
    ("L", (16, 2_048, 32, 8, 8_192, 32_000)),
    ("tiny", (2, 64, 2, 1, 128, 32_000)),
    ("odd", (12, 320, 8, 4, 1_000, 50_257)),
];

struct Weights {
    file: Arc<TensorFile>,
    scheme: String,
}

impl Weights {
    fn stack(&self, rows: usize, columns: usize) -> Stack {
        let tensor = Tensor { file: Arc::clone(&self.file), begin: 0, stored: Stored::Bf16, rows, columns };
        Stack::new(vec![tensor]).expect("one tensor")
    }

    fn linear(&self, rows: usize, columns: usize) -> LinearDescription {
        let stack = self.stack(rows, columns);
        let weight = match self.scheme.as_str() {
            "bf16" => WeightSource::Dense(stack),
            "int8" => WeightSource::MadeBytes(stack),
            "int4" => WeightSource::MadeNibbles { stack, group: GROUP, symmetric: false },
            other => panic!("{other} is none of bf16, int8, int4"),
        };
        LinearDescription { weight, bias: None }
    }

    fn norm(&self, width: usize) -> NormDescription {
        NormDescription { weight: self.stack(width, 1), epsilon: 1e-5 }
    }
}

fn build(on: Processor<'_>, weights: &Weights, shape: Shape) -> Program<Bf16> {
    let (layers, hidden, heads, kv_heads, inner, vocabulary) = shape;
    let head_dim = if hidden == 320 { 48 } else { hidden / heads };
    let model = ModelShape { hidden, vocabulary, layers, kv_heads, head_dim };
    let limits = ProgramLimits {
        max_step_tokens: 2_048,
        max_samples: 64,
        max_sequence_tokens: 4_096,
        blocks: 64 * 16,
        block_tokens: BLOCK_TOKENS,
        kv_format: KvFormat::Activations,
    };
    let mut builder = ProgramBuilder::new(model, limits);
    for _ in 0..layers {
        let attention = AttentionDescription {
            query_heads: heads,
            head_norms: None,
            window_tokens: None,
            rope: RopeDescription { frequencies: (0..head_dim / 2).map(|i| 0.8_f32.powi(i as i32)).collect() },
            qkv: weights.linear((heads + 2 * kv_heads) * head_dim, hidden),
            output: weights.linear(hidden, heads * head_dim),
        };
        let block = BlockDescription {
            attention_norm: weights.norm(hidden),
            attention,
            mlp_norm: weights.norm(hidden),
            gate_up: weights.linear(2 * inner, hidden),
            down: weights.linear(hidden, inner),
        };
        builder.block(on, &block).expect("it fits");
    }
    let stack = weights.stack(vocabulary, hidden);
    let weight = match weights.scheme.as_str() {
        "bf16" => WeightSource::Dense(stack),
        _ => WeightSource::MadeBytes(stack),
    };
    let head = LinearDescription { weight, bias: None };
    builder.finish(on, &weights.norm(hidden), &head, None).expect("it fits")
}

/// A step of `count` sequences with `rows` new tokens behind `before` old ones, timed.
fn seconds(program: &mut Program<Bf16>, on: Processor<'_>, count: usize, rows: usize, before: usize) -> f64 {
    let blocks = (before + rows).div_ceil(BLOCK_TOKENS);
    let all = count * rows;
    let token_ids: Vec<i32> = (0..all).map(|row| (row * 37 % 997) as i32).collect();
    let positions: Vec<i32> = (0..all).map(|row| (before + row % rows) as i32).collect();
    let slots: Vec<i32> =
        (0..all).map(|row| (row / rows * blocks * BLOCK_TOKENS + before + row % rows) as i32).collect();
    let query_start: Vec<i32> = (0..=count).map(|sequence| (sequence * rows) as i32).collect();
    let lengths = vec![(before + rows) as i32; count];
    let tables: Vec<i32> = (0..(count * blocks) as i32).collect();
    let offsets: Vec<i32> = (0..count).map(|sequence| (sequence * blocks) as i32).collect();
    let sample_rows: Vec<i32> = (1..=count).map(|sequence| (sequence * rows - 1) as i32).collect();
    let batch = AttentionBatch {
        query_start: &query_start,
        sequence_lengths: &lengths,
        block_tables: &tables,
        table_offsets: &offsets,
    };
    let step = StepRows {
        token_ids: &token_ids,
        positions: &positions,
        slot_mapping: &slots,
        batch,
        sample_rows: &sample_rows,
    };
    let start = Instant::now();
    program.forward(on, &step).expect("indices fit");
    start.elapsed().as_secs_f64()
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let given = |at: usize, default: &str| arguments.get(at).map_or(default.to_owned(), Clone::clone);
    let (name, scheme, cases) =
        (given(0, "S"), given(1, "bf16"), given(3, "prefill512,prefill2048,decode1,decode8,decode32"));
    let threads: usize = given(2, "2").parse().expect("a number of threads");
    let shape = SHAPES.iter().find(|(known, _)| *known == name).expect("one of S, M, L, tiny, odd").1;
    let pool = Pool::new(NonZeroUsize::new(threads).expect("at least one thread")).expect("threads can be started");
    let level = Level::from_environment(std::env::var("LLMSCALE_CPU_LEVEL").ok().as_deref()).expect("a level");
    let largest = (shape.5 * shape.1).max(2 * shape.4 * shape.1);
    let path = std::env::temp_dir().join(format!("step-rates-{}", std::process::id()));
    let noise = |at: usize| Bf16::from_f32(((at as u32).wrapping_mul(2_654_435_761) >> 8) as f32 / 4e8 - 0.02);
    let bytes: Vec<u8> = (0..largest).flat_map(|at| noise(at).0.to_le_bytes()).collect();
    std::fs::File::create(&path).and_then(|mut file| file.write_all(&bytes)).expect("a file can be written");
    drop(bytes);
    let file = Arc::new(TensorFile::open(path.to_str().expect("a plain name")).expect("it is there"));
    let on = Processor { pool: &pool, level };
    let start = Instant::now();
    let mut program = build(on, &Weights { file, scheme: scheme.clone() }, shape);
    let load = start.elapsed().as_secs_f64();
    std::fs::remove_file(&path).expect("it is there");
    println!("{name} {scheme}: {:.0} MB in {load:.2} s", program.weight_bytes() as f64 / 1e6);
    for case in cases.split(',') {
        let digits = case.find(|letter: char| letter.is_ascii_digit()).expect("a number");
        let number: usize = case[digits..].parse().expect("a number");
        let (count, rows, before) = if case.starts_with("prefill") { (1, number, 0) } else { (number, 1, CONTEXT) };
        let rounds = if case.starts_with("prefill") { ROUNDS } else { 8 * ROUNDS };
        seconds(&mut program, on, count, rows, before);
        let mut taken: Vec<f64> = (0..rounds).map(|_| seconds(&mut program, on, count, rows, before)).collect();
        taken.sort_by(f64::total_cmp);
        let rate = |seconds: f64| (count * rows) as f64 / seconds;
        println!(
            "{case:12} {:9.2} ms  {:8.1} tokens/s ({:.1} to {:.1})",
            taken[rounds / 2] * 1e3,
            rate(taken[rounds / 2]),
            rate(taken[rounds - 1]),
            rate(taken[0]),
        );
    }
}
