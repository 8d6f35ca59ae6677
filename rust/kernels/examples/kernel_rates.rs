//! Prints what the kernels reach next to what this machine can do: GB/s beside a read of memory, GFLOP/s beside the
//! arithmetic peak, milliseconds for the sampler. Medians of repeated runs, the best in brackets.
//! `cargo run --release -p llmscale-kernels --example kernel_rates [threads] [level]`; give it an idle machine.
#![allow(clippy::print_stdout, reason = "the example prints a table")]

use llmscale_kernels::activation::silu_and_multiply;
use llmscale_kernels::dispatch::Level;
use llmscale_kernels::element::{Bf16, Element};
use llmscale_kernels::huge_pages::HugeArray;
use llmscale_kernels::kv_format::KvFormat;
use llmscale_kernels::kv_region::{KvRegionShape, SlotMapping};
use llmscale_kernels::norm::add_rms_norm;
use llmscale_kernels::paged_attention::{AttentionBatch, AttentionPlan, AttentionShape};
use llmscale_kernels::pool::Pool;
use llmscale_kernels::rope_cache::{RopeCacheInput, RotaryTable, rope_and_cache};
use llmscale_kernels::sampler::{Logits, SamplerRow, sample};
use std::hint::black_box;
use std::num::NonZeroUsize;
use std::time::{Duration, Instant};

const QUERY_HEADS: usize = 9;
const KV_HEADS: usize = 3;
const HEAD_DIM: usize = 64;
const LAYERS: usize = 30;
const BLOCK_TOKENS: usize = 32;
const VOCABULARY: usize = 32_000;

/// Median and best time of a run, repeated for at least `MIN_TIME`.
#[derive(Clone, Copy)]
struct Timing {
    median: f64,
    best: f64,
}

impl Timing {
    const MIN_TIME: Duration = Duration::from_millis(700);

    fn of(mut run: impl FnMut()) -> Self {
        run();
        let mut seconds = Vec::new();
        let start = Instant::now();
        while seconds.len() < 5 || start.elapsed() < Self::MIN_TIME {
            let before = Instant::now();
            run();
            seconds.push(before.elapsed().as_secs_f64());
        }
        seconds.sort_by(f64::total_cmp);
        Self { median: seconds[seconds.len() / 2], best: seconds[0] }
    }

    /// A rate in units of 1e9.
    fn giga(self, amount: f64) -> String {
        format!("{:7.1} ({:.1})", amount / self.median / 1e9, amount / self.best / 1e9)
    }

    fn milliseconds(self) -> String {
        format!("{:7.3} ({:.3}) ms", self.median * 1e3, self.best * 1e3)
    }
}

/// Xorshift: the contents do not matter, only that they are neither zero nor denormal.
fn noise(count: usize, scale: f32) -> Vec<f32> {
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    let mut uniform = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / 16_777_216.0 - 0.5
    };
    // Four uniform numbers make a good enough normal one.
    (0..count).map(|_| (uniform() + uniform() + uniform() + uniform()) * 1.73 * scale).collect()
}

fn bf16_noise(count: usize) -> Vec<Bf16> {
    let period: Vec<Bf16> = noise(1 << 16, 1.0).into_iter().map(Bf16::from_f32).collect();
    (0..count).map(|index| period[(index + index / 65_536 * 77) % 65_536]).collect()
}

/// Read-only sum over 512 MiB: the limit of a decode step.
fn read_limit(pool: &Pool) -> Timing {
    const CHUNK: usize = 1 << 18;
    let mut data = HugeArray::<f32>::zeroed((512 << 20) / 4).expect("memory");
    data.fill(1.5);
    Timing::of(|| {
        pool.parallel_for(data.len() / CHUNK, |chunk| {
            let mut sums = [0_u32; 64];
            for words in data[chunk * CHUNK..][..CHUNK].chunks_exact(64) {
                for (sum, word) in sums.iter_mut().zip(words) {
                    *sum = sum.wrapping_add(word.to_bits());
                }
            }
            black_box(sums);
        })
        .expect("not nested");
    })
}

/// Copy of 256 MiB: counted as read and written once.
fn copy_limit(pool: &Pool) -> Timing {
    const CHUNK: usize = 1 << 20;
    let source = vec![1_u8; 256 << 20];
    let target: Vec<std::sync::Mutex<Vec<u8>>> =
        (0..source.len() / CHUNK).map(|_| std::sync::Mutex::new(vec![0; CHUNK])).collect();
    Timing::of(|| {
        pool.parallel_for(target.len(), |chunk| {
            target[chunk].lock().expect("no panic").copy_from_slice(&source[chunk * CHUNK..][..CHUNK]);
        })
        .expect("not nested");
    })
}

/// Floating-point operations of `iterations` multiply-adds on registers, with the widest instruction of the level.
#[cfg(target_arch = "x86_64")]
mod peak {
    #![expect(unsafe_code, reason = "vendor intrinsics, called where detection found them")]

    use core::arch::x86_64::{
        __m512bh, __m512i, _mm256_fmadd_ps, _mm256_set1_ps, _mm512_dpbf16_ps, _mm512_fmadd_ps, _mm512_set1_epi32,
        _mm512_set1_ps,
    };
    use llmscale_kernels::dispatch::Level;
    use std::hint::black_box;

    /// # Safety
    /// The machine must have the level's instructions.
    #[target_feature(enable = "avx512f,avx512bf16")]
    unsafe fn bf16_512(iterations: usize) -> f64 {
        // SAFETY: plain bits of the same size.
        let one = unsafe { core::mem::transmute::<__m512i, __m512bh>(_mm512_set1_epi32(black_box(0x3f80_3f80))) };
        let mut sums = [_mm512_set1_ps(0.0); 14];
        for _ in 0..iterations {
            for sum in &mut sums {
                *sum = _mm512_dpbf16_ps(*sum, one, one);
            }
        }
        black_box(sums);
        (iterations * 14 * 64) as f64
    }

    /// # Safety
    /// The machine must have the level's instructions.
    #[target_feature(enable = "avx512f")]
    unsafe fn f32_512(iterations: usize) -> f64 {
        let factor = _mm512_set1_ps(black_box(0.999));
        let mut sums = [_mm512_set1_ps(1.0); 14];
        for _ in 0..iterations {
            for sum in &mut sums {
                *sum = _mm512_fmadd_ps(*sum, factor, factor);
            }
        }
        black_box(sums);
        (iterations * 14 * 32) as f64
    }

    /// # Safety
    /// The machine must have the level's instructions.
    #[target_feature(enable = "avx2,fma")]
    unsafe fn f32_256(iterations: usize) -> f64 {
        let factor = _mm256_set1_ps(black_box(0.999));
        let mut sums = [_mm256_set1_ps(1.0); 14];
        for _ in 0..iterations {
            for sum in &mut sums {
                *sum = _mm256_fmadd_ps(*sum, factor, factor);
            }
        }
        black_box(sums);
        (iterations * 14 * 16) as f64
    }

    pub(crate) fn operations(level: Level, iterations: usize) -> Option<f64> {
        assert!(level <= Level::detected());
        // SAFETY: the level was detected.
        unsafe {
            match level {
                Level::Avx512Bf16 => Some(bf16_512(iterations)),
                Level::Avx512 => Some(f32_512(iterations)),
                Level::Avx2 => Some(f32_256(iterations)),
                Level::Portable => None,
            }
        }
    }
}

#[cfg(not(target_arch = "x86_64"))]
mod peak {
    pub(crate) fn operations(_: llmscale_kernels::dispatch::Level, _: usize) -> Option<f64> {
        None
    }
}

fn print_arithmetic_limit(pool: &Pool, level: Level) {
    const ITERATIONS: usize = 200_000;
    if let Some(operations) = peak::operations(level, 1) {
        let total = operations * ITERATIONS as f64 * 8.0 * pool.threads() as f64;
        let timing = Timing::of(|| {
            pool.parallel_for(8 * pool.threads(), |_| {
                black_box(peak::operations(level, ITERATIONS));
            })
            .expect("not nested");
        });
        println!("limit: multiply-add in registers   {} GFLOP/s", timing.giga(total));
    }
}

struct AttentionCase {
    shape: AttentionShape,
    query_start: Vec<i32>,
    lengths: Vec<i32>,
    offsets: Vec<i32>,
    tables: Vec<i32>,
}

impl AttentionCase {
    fn new(sequences: usize, context: usize, rows: usize) -> Self {
        let blocks_each = context.div_ceil(BLOCK_TOKENS);
        let region = KvRegionShape {
            blocks: sequences * blocks_each,
            layers: LAYERS,
            kv_heads: KV_HEADS,
            block_tokens: BLOCK_TOKENS,
            head_dim: HEAD_DIM,
            format: KvFormat::Activations,
        };
        let shape = AttentionShape { query_heads: QUERY_HEADS, softmax_scale: 0.125, window_tokens: None, region };
        // Blocks of different sequences take turns, as they do in a pool that has run for a while.
        let table = |sequence: usize| (0..blocks_each).map(move |block| (block * sequences + sequence) as i32);
        Self {
            shape,
            query_start: (0..=sequences).map(|sequence| (sequence * rows) as i32).collect(),
            lengths: vec![context as i32; sequences],
            offsets: (0..sequences).map(|sequence| (sequence * blocks_each) as i32).collect(),
            tables: (0..sequences).flat_map(table).collect(),
        }
    }

    /// Time of one step over all layers.
    fn time<T: Element>(&self, pool: &Pool, level: Level, region: &[T]) -> Timing {
        let batch = AttentionBatch {
            query_start: &self.query_start,
            sequence_lengths: &self.lengths,
            table_offsets: &self.offsets,
            block_tables: &self.tables,
        };
        let elements = *self.query_start.last().expect("a sequence") as usize * QUERY_HEADS * HEAD_DIM;
        let query: Vec<T> = noise(elements, 1.0).into_iter().map(T::from_f32).collect();
        let mut output = vec![T::default(); elements];
        Timing::of(|| {
            let plan = AttentionPlan::new(&self.shape, &batch, pool.threads()).expect("a valid batch");
            for layer in 0..LAYERS {
                plan.run(pool, level, layer, &query, &region[..self.shape.region.elements()], &mut output)
                    .expect("matching buffers");
            }
        })
    }
}

fn print_attention(pool: &Pool, level: Level) {
    println!("attention, {QUERY_HEADS}/{KV_HEADS} heads of {HEAD_DIM}, {LAYERS} layers, bf16");
    let largest = AttentionCase::new(32, 2048, 1);
    let mut region = HugeArray::zeroed(largest.shape.region.elements()).expect("memory");
    region.copy_from_slice(&bf16_noise(largest.shape.region.elements()));
    for (sequences, context) in [(1, 256), (1, 2048), (8, 256), (8, 2048), (32, 256), (32, 2048)] {
        let case = AttentionCase::new(sequences, context, 1);
        let timing = case.time(pool, level, &region);
        let bytes = (case.shape.region.elements() * 2) as f64;
        let (time, rate) = (timing.milliseconds(), timing.giga(bytes));
        println!("  decode {sequences:2} x {context:4} ({:6.1} MB)   {time} {rate} GB/s", bytes / 1e6);
    }
    for (context, rows) in [(512, 512), (2048, 2048), (2048, 256)] {
        let case = AttentionCase::new(1, context, rows);
        let timing = case.time(pool, level, &region);
        let pairs = rows * context - rows * (rows - 1) / 2;
        let operations = (4 * pairs * HEAD_DIM * QUERY_HEADS * LAYERS) as f64;
        let (time, rate) = (timing.milliseconds(), timing.giga(operations));
        println!("  prefill {rows:4} of {context:4}          {time} {rate} GFLOP/s");
    }
}

fn print_row_kernels(pool: &Pool, level: Level) {
    println!("row kernels, 512 rows, bf16");
    let (rows, hidden, ffn) = (512, 576, 1536);
    let gate_up = bf16_noise(rows * 2 * ffn);
    let mut output = vec![Bf16::default(); rows * ffn];
    let timing = Timing::of(|| silu_and_multiply(pool, level, &gate_up, ffn, &mut output).expect("matching buffers"));
    println!("  silu and multiply               {} GB/s", timing.giga((3 * rows * ffn * 2) as f64));

    let (input, weight) = (bf16_noise(rows * hidden), bf16_noise(hidden));
    let (mut residual, mut output) = (vec![Bf16::default(); rows * hidden], vec![Bf16::default(); rows * hidden]);
    let timing = Timing::of(|| {
        residual.fill(Bf16::default());
        add_rms_norm(pool, level, &input, &mut residual, &weight, 1e-5, &mut output).expect("matching buffers");
    });
    println!("  residual and norm               {} GB/s", timing.giga((4 * rows * hidden * 2) as f64));

    let case = AttentionCase::new(1, 2048, rows);
    let region_shape = case.shape.region;
    let mut region = vec![Bf16::default(); region_shape.elements()];
    let width = (QUERY_HEADS + 2 * KV_HEADS) * HEAD_DIM;
    let qkv = bf16_noise(rows * width);
    let mut query = vec![Bf16::default(); rows * QUERY_HEADS * HEAD_DIM];
    let table: Vec<f32> = noise(2048 * HEAD_DIM / 2, 1.0);
    let slots: Vec<i32> = (0..rows as i32).collect();
    let slots = SlotMapping::new(region_shape, &slots).expect("valid slots");
    let positions: Vec<i32> = (0..rows as i32).collect();
    let input = RopeCacheInput {
        qkv: &qkv,
        query_heads: QUERY_HEADS,
        positions: &positions,
        table: RotaryTable { cosines: &table, sines: &table, rotary_dim: HEAD_DIM },
        norms: None,
        slots: &slots,
        layer: 3,
    };
    let timing = Timing::of(|| rope_and_cache(pool, level, &input, &mut query, &mut region).expect("matching buffers"));
    println!("  rope and cache                  {} GB/s", timing.giga((2 * rows * width * 2) as f64));
}

fn print_sampler(pool: &Pool, level: Level) {
    const ROWS: usize = 64;
    println!("sampler, {ROWS} x {VOCABULARY}");
    for (name, spread) in [("flat (deviation 1)", 1.0), ("peaked (deviation 4)", 4.0)] {
        let values = noise(ROWS * VOCABULARY, spread);
        let halves: Vec<Bf16> = values.iter().map(|&x| Bf16::from_f32(x)).collect();
        let plain = SamplerRow { seed: 1, ..SamplerRow::default() };
        for (parameters, row) in [
            ("greedy", SamplerRow { temperature: 0.0, ..plain }),
            ("temperature 1", plain),
            ("top-k 50", SamplerRow { top_k: 50, ..plain }),
            ("top-p 0.9", SamplerRow { top_p: 0.9, ..plain }),
            ("top-p 0.9, top-k 50", SamplerRow { top_k: 50, top_p: 0.9, ..plain }),
            ("min-p 0.05", SamplerRow { min_p: 0.05, ..plain }),
            ("greedy, 5 logprobs", SamplerRow { temperature: 0.0, logprobs: Some(5), ..plain }),
        ] {
            let rows = [row; ROWS];
            let whole = Timing::of(|| {
                let logits = Logits { values: &values, vocabulary: VOCABULARY, row_stride: VOCABULARY };
                black_box(sample(pool, level, &logits, &rows).expect("valid rows"));
            });
            let half = Timing::of(|| {
                let logits = Logits { values: &halves, vocabulary: VOCABULARY, row_stride: VOCABULARY };
                black_box(sample(pool, level, &logits, &rows).expect("valid rows"));
            });
            let (whole, half) = (whole.milliseconds(), half.milliseconds());
            println!("  {name:20} {parameters:20} f32 {whole}   bf16 {half}");
        }
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
    println!("limit: read 512 MiB                {} GB/s", read_limit(&pool).giga((512 << 20) as f64));
    println!("limit: copy 256 MiB                {} GB/s", copy_limit(&pool).giga((512 << 20) as f64));
    print_arithmetic_limit(&pool, level);
    print_attention(&pool, level);
    print_row_kernels(&pool, level);
    print_sampler(&pool, level);
}
