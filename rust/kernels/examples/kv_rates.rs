//! Prints what decode attention takes over keys and values in bf16 and in bytes, per step over all layers, and what a
//! step's rows take to be written. The two take turns, so that neither has the quieter machine; medians, the best in
//! brackets. `cargo run --release -p llmscale-kernels --example kv_rates [threads] [level]`; give it an idle machine.
#![allow(clippy::print_stdout, reason = "the example prints a table")]

use llmscale_kernels::dispatch::Level;
use llmscale_kernels::element::Bf16;
use llmscale_kernels::huge_pages::{HugeArray, Number};
use llmscale_kernels::kv_format::{KvElement, KvFormat};
use llmscale_kernels::kv_region::{KvRegionShape, SlotMapping};
use llmscale_kernels::paged_attention::{AttentionBatch, AttentionPlan, AttentionShape};
use llmscale_kernels::pool::Pool;
use llmscale_kernels::rope_cache::{RopeCacheInput, RotaryTable, rope_and_cache};
use std::num::NonZeroUsize;
use std::time::{Duration, Instant};

const BLOCK_TOKENS: usize = 32;
/// Layers share a region of this many, so that long contexts of large heads fit in memory.
const LAYERS: usize = 12;

/// Query heads, KV heads, head size.
const HEADS: [(usize, usize, usize); 2] = [(9, 3, 64), (16, 8, 128)];
/// Sequences and the tokens of each.
const CONTEXTS: [(usize, usize); 8] =
    [(1, 256), (1, 1024), (1, 2048), (1, 4096), (1, 8192), (8, 256), (8, 2048), (8, 8192)];
const MIN_TIME: Duration = Duration::from_millis(900);

/// The contents do not matter, only that they are neither zero nor denormal.
fn noise(count: usize) -> Vec<Bf16> {
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    let mut uniform = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / 16_777_216.0 - 0.5
    };
    (0..count).map(|_| Bf16::from_f32((uniform() + uniform() + uniform()) * 2.0)).collect()
}

/// Rows of a prompt written to their slots: every block of a sequence in turn.
fn filled<K: KvElement<Bf16> + Number>(pool: &Pool, level: Level, shape: &AttentionShape) -> (HugeArray<K>, f64) {
    let region = shape.region;
    let mut memory = HugeArray::zeroed(region.elements()).expect("memory");
    let rows = region.slots().min(1024);
    let qkv = noise(rows * (shape.query_heads + 2 * region.kv_heads) * region.head_dim);
    let mut query = vec![Bf16::default(); rows * shape.query_heads * region.head_dim];
    let table = vec![0.7_f32; region.head_dim / 2];
    let mut seconds = Vec::new();
    for first in (0..region.slots()).step_by(rows) {
        let slots: Vec<i32> = (first..(first + rows).min(region.slots())).map(|slot| slot as i32).collect();
        let slots = SlotMapping::new(region, &slots).expect("valid slots");
        let count = slots.rows();
        for layer in 0..region.layers {
            let input = RopeCacheInput {
                qkv: &qkv[..count * (shape.query_heads + 2 * region.kv_heads) * region.head_dim],
                query_heads: shape.query_heads,
                positions: &vec![0; count],
                table: RotaryTable { cosines: &table, sines: &table, rotary_dim: region.head_dim },
                norms: None,
                slots: &slots,
                layer,
            };
            let before = Instant::now();
            let query = &mut query[..count * shape.query_heads * region.head_dim];
            rope_and_cache(pool, level, &input, query, &mut memory).expect("matching buffers");
            seconds.push(before.elapsed().as_secs_f64() / count as f64);
        }
    }
    seconds.sort_by(f64::total_cmp);
    (memory, seconds[seconds.len() / 2])
}

struct Case {
    plan: AttentionPlan,
    query: Vec<Bf16>,
    output: Vec<Bf16>,
}

impl Case {
    fn new(pool: &Pool, shape: &AttentionShape, sequences: usize, context: usize) -> Self {
        let each = context / BLOCK_TOKENS;
        let batch = AttentionBatch {
            query_start: &(0..=sequences as i32).collect::<Vec<_>>(),
            sequence_lengths: &vec![context as i32; sequences],
            table_offsets: &(0..sequences).map(|sequence| (sequence * each) as i32).collect::<Vec<_>>(),
            // Blocks of different sequences take turns, as they do in a pool that has run for a while.
            block_tables: &(0..sequences * each)
                .map(|entry| (entry % each * sequences + entry / each) as i32)
                .collect::<Vec<_>>(),
        };
        let elements = sequences * shape.query_heads * shape.region.head_dim;
        let plan = AttentionPlan::new(shape, &batch, pool.threads()).expect("a valid batch");
        Self { plan, query: noise(elements), output: vec![Bf16::default(); elements] }
    }

    fn step<K: KvElement<Bf16>>(&mut self, pool: &Pool, level: Level, region: &[K]) -> f64 {
        let before = Instant::now();
        for layer in 0..LAYERS {
            self.plan.run(pool, level, layer, &self.query, region, &mut self.output).expect("matching buffers");
        }
        before.elapsed().as_secs_f64()
    }
}

fn median_and_best(seconds: &mut [f64]) -> (f64, f64) {
    seconds.sort_by(f64::total_cmp);
    (seconds[seconds.len() / 2], seconds[0])
}

fn print_heads(pool: &Pool, level: Level, (query_heads, kv_heads, head_dim): (usize, usize, usize)) {
    println!("{query_heads}/{kv_heads} heads of {head_dim}, {LAYERS} layers");
    let shape = |sequences: usize, context: usize, format| AttentionShape {
        query_heads,
        softmax_scale: (head_dim as f32).powf(-0.5),
        window_tokens: None,
        region: KvRegionShape {
            blocks: sequences * context / BLOCK_TOKENS,
            layers: LAYERS,
            kv_heads,
            block_tokens: BLOCK_TOKENS,
            head_dim,
            format,
        },
    };
    for (sequences, context) in CONTEXTS {
        let plain_shape = shape(sequences, context, KvFormat::Activations);
        let bytes_shape = shape(sequences, context, KvFormat::Bytes);
        let (plain_region, plain_write) = filled::<Bf16>(pool, level, &plain_shape);
        let (bytes_region, bytes_write) = filled::<i8>(pool, level, &bytes_shape);
        let mut plain = Case::new(pool, &plain_shape, sequences, context);
        let mut bytes = Case::new(pool, &bytes_shape, sequences, context);
        let (mut of_plain, mut of_bytes) = (Vec::new(), Vec::new());
        let start = Instant::now();
        while of_plain.len() < 7 || start.elapsed() < MIN_TIME {
            of_plain.push(plain.step(pool, level, &plain_region));
            of_bytes.push(bytes.step(pool, level, &bytes_region));
        }
        let ((plain, plain_best), (bytes, bytes_best)) =
            (median_and_best(&mut of_plain), median_and_best(&mut of_bytes));
        let (megabytes, of_bytes) =
            (size_of_val(&*plain_region) as f64 / 1e6, size_of_val(&*bytes_region) as f64 / 1e6);
        println!(
            "  {sequences} x {context:4}: bf16 {megabytes:7.1} MB {:8.3} ({:.3}) ms   bytes {of_bytes:6.1} MB {:8.3} ({:.3}) ms   {:.2} times   row {:.2} and {:.2} us",
            plain * 1e3,
            plain_best * 1e3,
            bytes * 1e3,
            bytes_best * 1e3,
            plain / bytes,
            plain_write * 1e6,
            bytes_write * 1e6,
        );
    }
}

fn main() {
    let mut arguments = std::env::args().skip(1);
    let threads = arguments.next().map_or_else(std::thread::available_parallelism, |text| {
        text.parse::<NonZeroUsize>().map_err(std::io::Error::other)
    });
    let pool = Pool::pinned(threads.expect("a number of threads")).expect("a CPU for every thread");
    let level = Level::from_environment(arguments.next().as_deref()).expect("a level of this machine");
    println!("{} threads, level {level}; median (best)", pool.threads());
    for heads in HEADS {
        print_heads(&pool, level, heads);
    }
}
