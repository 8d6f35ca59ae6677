//! Paged attention: equal to the scalar reference, and bit for bit the same however the rows are batched, chunked,
//! paged or spread over threads.
#![allow(missing_docs, reason = "a test binary")]

mod support;

use llmscale_kernels::dispatch::Level;
use llmscale_kernels::element::{Bf16, Element};
use llmscale_kernels::error::KernelError;
use llmscale_kernels::kv_format::{KvElement, KvFormat};
use llmscale_kernels::kv_region::KvRegionShape;
use llmscale_kernels::paged_attention::{AttentionBatch, AttentionPlan, AttentionShape, paged_attention};
use llmscale_kernels::reference;
use proptest::prelude::*;
use support::{Chunk, Poison, Random, Sequence, Step, pool};

fn shape(query_heads: usize, kv_heads: usize, head_dim: usize, block_tokens: usize) -> AttentionShape {
    AttentionShape {
        query_heads,
        softmax_scale: 1.0 / (head_dim as f32).sqrt(),
        window_tokens: None,
        region: KvRegionShape { blocks: 1, layers: 2, kv_heads, block_tokens, head_dim, format: KvFormat::Activations },
    }
}

/// The outputs of a step as f32, one vector per row.
fn compute<T: Element, K: KvElement<T> + Poison>(
    step: &Step<T, K>,
    level: Level,
    threads: usize,
    layer: usize,
) -> Vec<Vec<f32>> {
    let pool = pool(threads);
    let mut output = vec![T::from_f32(f32::NAN); step.query.len()];
    paged_attention(&pool, level, &step.shape, &step.batch(), layer, &step.query, &step.region, &mut output).unwrap();
    let row = step.shape.query_heads * step.shape.region.head_dim;
    output.chunks_exact(row).map(|row| row.iter().map(|x| x.to_f32()).collect()).collect()
}

fn assert_matches_reference<T: Element, K: KvElement<T> + Poison>(
    shape: AttentionShape,
    chunks: &[(usize, usize)],
    tolerance: f64,
) {
    let mut random = Random(chunks.len() as u64 + shape.region.head_dim as u64);
    let sequences: Vec<Sequence<T>> =
        chunks.iter().map(|&(_, length)| Sequence::random(&mut random, &shape, length)).collect();
    let chunks: Vec<Chunk> =
        chunks.iter().enumerate().map(|(sequence, &(computed, length))| Chunk { sequence, computed, length }).collect();
    let step = Step::<T, K>::new(&mut random, shape, &sequences, &chunks);
    for layer in 0..shape.region.layers {
        let expected = reference::paged_attention(&step.shape, &step.batch(), layer, &step.query, &step.region);
        for level in Level::available() {
            let given = compute(&step, level, 2, layer);
            for (index, (given, expected)) in given.iter().flatten().zip(&expected).enumerate() {
                let error = (f64::from(*given) - expected).abs();
                assert!(error < tolerance, "{level}, {shape:?}: element {index} is {given} for {expected}");
            }
        }
    }
}

// The values have unit variance, so outputs are at most a few units: 2e-6 is a few f32 roundings, 2e-2 a few bf16 ones
// (step 2^-8 relative) of weights and of the output itself.
const F32_TOLERANCE: f64 = 4e-6;
const BF16_TOLERANCE: f64 = 2e-2;

#[test]
fn f32_matches_the_reference_for_every_head_size_and_group() {
    for (query_heads, kv_heads, head_dim) in
        [(9, 3, 64), (2, 2, 8), (4, 1, 40), (6, 2, 48), (8, 8, 80), (14, 2, 96), (4, 2, 128), (3, 1, 256), (7, 1, 24)]
    {
        let chunks = [(0, 1), (70, 71), (0, 67), (30, 100), (255, 257), (520, 521), (0, 300)];
        assert_matches_reference::<f32, f32>(shape(query_heads, kv_heads, head_dim, 32), &chunks, F32_TOLERANCE);
    }
}

#[test]
fn bf16_matches_the_reference_for_every_head_size_and_group() {
    for (query_heads, kv_heads, head_dim) in
        [(9, 3, 64), (2, 2, 8), (4, 1, 40), (6, 2, 48), (8, 8, 80), (14, 2, 96), (4, 2, 128), (3, 1, 256), (7, 1, 24)]
    {
        let chunks = [(0, 1), (70, 71), (0, 67), (30, 100), (255, 257), (520, 521), (0, 300)];
        assert_matches_reference::<Bf16, Bf16>(shape(query_heads, kv_heads, head_dim, 32), &chunks, BF16_TOLERANCE);
    }
}

#[test]
fn bytes_match_the_reference_for_every_head_size_and_group() {
    for (query_heads, kv_heads, head_dim) in
        [(9, 3, 64), (2, 2, 8), (4, 1, 40), (6, 2, 48), (8, 8, 80), (14, 2, 96), (4, 2, 128), (3, 1, 256), (7, 1, 24)]
    {
        let chunks = [(0, 1), (70, 71), (0, 67), (30, 100), (255, 257), (520, 521), (0, 300)];
        let shape = shape(query_heads, kv_heads, head_dim, 32);
        assert_matches_reference::<f32, i8>(shape, &chunks, F32_TOLERANCE);
        assert_matches_reference::<Bf16, i8>(shape, &chunks, BF16_TOLERANCE);
    }
}

#[test]
fn every_block_size_matches_the_reference() {
    for block_tokens in [8, 16, 32, 64, 128, 1024] {
        let chunks = [(0, 9), (128, 129), (200, 290)];
        assert_matches_reference::<f32, f32>(shape(4, 2, 16, block_tokens), &chunks, F32_TOLERANCE);
        assert_matches_reference::<Bf16, Bf16>(shape(4, 2, 16, block_tokens), &chunks, BF16_TOLERANCE);
        assert_matches_reference::<Bf16, i8>(shape(4, 2, 16, block_tokens), &chunks, BF16_TOLERANCE);
    }
}

#[test]
fn sliding_windows_match_the_reference() {
    for window_tokens in [1, 2, 31, 64, 65, 100, 300, 5000] {
        let shape = AttentionShape { window_tokens: Some(window_tokens), ..shape(6, 2, 32, 16) };
        let chunks = [(0, 5), (399, 400), (0, 130), (290, 417)];
        assert_matches_reference::<f32, f32>(shape, &chunks, F32_TOLERANCE);
        assert_matches_reference::<Bf16, Bf16>(shape, &chunks, BF16_TOLERANCE);
        assert_matches_reference::<f32, i8>(shape, &chunks, F32_TOLERANCE);
        assert_matches_reference::<Bf16, i8>(shape, &chunks, BF16_TOLERANCE);
    }
}

/// Rows of one sequence computed alone, one decode step each, on one thread: the bits that all else must give.
fn decode_bits<T: Element, K: KvElement<T> + Poison>(
    shape: AttentionShape,
    sequence: &Sequence<T>,
    positions: &[usize],
    level: Level,
) -> Vec<Vec<f32>> {
    let mut random = Random(7);
    let mut rows = Vec::new();
    for &position in positions {
        let sequences = std::slice::from_ref(sequence);
        let chunk = Chunk { sequence: 0, computed: position, length: position + 1 };
        let step = Step::<T, K>::new(&mut random, shape, sequences, &[chunk]);
        rows.extend(compute(&step, level, 1, 1));
    }
    rows
}

fn bits(rows: &[Vec<f32>]) -> Vec<Vec<u32>> {
    rows.iter().map(|row| row.iter().map(|x| x.to_bits()).collect()).collect()
}

fn assert_invariant<T: Element, K: KvElement<T> + Poison>(
    seed: u64,
    shape: AttentionShape,
    other_block_tokens: usize,
    lengths: &[usize],
) {
    let mut random = Random(seed);
    let sequences: Vec<Sequence<T>> =
        lengths.iter().map(|&tokens| Sequence::random(&mut random, &shape, tokens)).collect();
    let paged = AttentionShape { region: KvRegionShape { block_tokens: other_block_tokens, ..shape.region }, ..shape };
    for level in Level::available() {
        // The last rows of every sequence, computed as one chunk in one batch with all others.
        let chunks: Vec<Chunk> = lengths
            .iter()
            .enumerate()
            .map(|(sequence, &length)| Chunk { sequence, computed: random.below(length), length })
            .collect();
        let mut expected = Vec::new();
        for chunk in &chunks {
            let mut positions: Vec<usize> = (chunk.computed..chunk.length).collect();
            // Each expected row costs a step of its own, so long chunks are sampled.
            if positions.len() > 12 {
                positions = (0..12).map(|_| chunk.computed + random.below(chunk.length - chunk.computed)).collect();
            }
            let rows = decode_bits::<T, K>(shape, &sequences[chunk.sequence], &positions, level);
            expected
                .extend(positions.into_iter().zip(bits(&rows)).map(|(position, row)| (chunk.sequence, position, row)));
        }
        let step = Step::<T, K>::new(&mut random, paged, &sequences, &chunks);
        for threads in [1, 2, 5] {
            let given = bits(&compute(&step, level, threads, 1));
            for (sequence, position, row) in &expected {
                let index = step.query_start[*sequence] as usize + position - chunks[*sequence].computed;
                assert!(given[index] == *row, "{level}: row at {position} of {sequence} differs on {threads} threads");
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_row_has_the_same_bits_alone_in_a_chunk_in_a_batch_and_on_any_number_of_threads(
        seed in any::<u64>(),
        kv_heads in 1_usize..4,
        group in 1_usize..8,
        head_octets in 1_usize..13,
        block_tokens in prop::sample::select(vec![8_usize, 16, 32, 64]),
        other_block_tokens in prop::sample::select(vec![8_usize, 32, 128]),
        window in prop::option::of(1_u32..400),
        lengths in prop::collection::vec(1_usize..700, 1..4),
    ) {
        let shape = AttentionShape { window_tokens: window, ..shape(kv_heads * group, kv_heads, head_octets * 8, block_tokens) };
        assert_invariant::<f32, f32>(seed, shape, other_block_tokens, &lengths);
        assert_invariant::<Bf16, Bf16>(seed, shape, other_block_tokens, &lengths);
        assert_invariant::<f32, i8>(seed, shape, other_block_tokens, &lengths);
        assert_invariant::<Bf16, i8>(seed, shape, other_block_tokens, &lengths);
    }
}

#[test]
fn a_long_sequence_cut_along_its_splits_keeps_its_bits() {
    assert_invariant::<Bf16, Bf16>(3, shape(4, 2, 64, 32), 32, &[3000]);
    assert_invariant::<Bf16, i8>(3, shape(4, 2, 64, 32), 32, &[3000]);
    assert_invariant::<f32, f32>(
        3,
        AttentionShape { window_tokens: Some(1111), ..shape(4, 2, 64, 32) },
        16,
        &[3000, 5],
    );
}

/// The last rows of sequences, as (first row, tokens), with memory for partial results of so many bytes, on 1 and 16
/// threads.
fn assert_same_bits_in_waves(shape: AttentionShape, chunks: &[(usize, usize)], bytes: &[usize]) {
    let mut random = Random(11);
    let sequences: Vec<Sequence<Bf16>> =
        chunks.iter().map(|&(_, tokens)| Sequence::random(&mut random, &shape, tokens)).collect();
    let chunks: Vec<Chunk> =
        chunks.iter().enumerate().map(|(sequence, &(computed, length))| Chunk { sequence, computed, length }).collect();
    let step = Step::<Bf16>::new(&mut random, shape, &sequences, &chunks);
    for level in Level::available() {
        let expected = bits(&compute(&step, level, 1, 1)).concat();
        for (&bytes, threads) in bytes.iter().flat_map(|bytes| [(bytes, 1), (bytes, 16)]) {
            let plan = AttentionPlan::within(&step.shape, &step.batch(), threads, bytes).unwrap();
            let mut output = vec![Bf16::from_f32(f32::NAN); step.query.len()];
            plan.run(&pool(threads), level, 1, &step.query, &step.region, &mut output).unwrap();
            let given: Vec<u32> = output.iter().map(|x| x.to_f32().to_bits()).collect();
            assert!(given == expected, "{level}: {bytes} bytes, {threads} threads");
        }
    }
}

#[test]
fn waves_over_little_memory_have_the_bits_of_one() {
    // All take 800 KB together, and the results of one row and head 8 KB.
    let bytes = [1 << 20, 300_000, 40_000, 9_000, 0];
    assert_same_bits_in_waves(shape(4, 2, 64, 32), &[(2950, 3000), (699, 700)], &bytes);
    // One tile, long enough for merges of some of its heads and rows.
    assert_same_bits_in_waves(shape(4, 2, 8, 32), &[(49_976, 50_000)], &[16 << 20, 1 << 20]);
}

#[test]
fn whole_tiles_of_few_vectors_have_the_bits_of_packed_ones() {
    for group in 1..=5 {
        for head_dim in [32, 64, 96, 128] {
            assert_invariant::<Bf16, Bf16>(group as u64, shape(2 * group, 2, head_dim, 32), 8, &[130, 330, 64]);
        }
    }
}

fn assert_later_tokens_do_not_reach<K: KvElement<Bf16> + Poison>() {
    let shape = shape(4, 2, 32, 32);
    let mut random = Random(5);
    let clean: Sequence<Bf16> = Sequence::random(&mut random, &shape, 100);
    let mut broken = Sequence { tokens: 100, queries: clean.queries.clone(), kv: clean.kv.clone() };
    // Everything from the odd position 71 on is not a number; row 70 shares a pair, a tile and a block with it.
    let token = broken.kv.len() / 100;
    broken.kv[71 * token..].fill(Bf16::from_f32(f32::NAN));
    let sequences = [clean, broken];
    for level in Level::available() {
        let [clean, broken] = [0, 1].map(|sequence| {
            let mut random = Random(6);
            let chunk = Chunk { sequence, computed: 0, length: 100 };
            bits(&compute(&Step::<Bf16, K>::new(&mut random, shape, &sequences, &[chunk]), level, 1, 0))
        });
        assert!(clean[..71] == broken[..71], "{level}");
        assert!(broken[71..].iter().flatten().all(|&bits| f32::from_bits(bits).is_nan()), "{level}");
    }
}

#[test]
fn later_tokens_of_the_sequence_cannot_reach_a_row_even_as_nan() {
    assert_later_tokens_do_not_reach::<Bf16>();
    assert_later_tokens_do_not_reach::<i8>();
}

fn assert_no_number_gives_no_number<T: Element, K: KvElement<T> + Poison>() {
    let shape = shape(4, 2, 32, 32);
    let nan = T::from_f32(f32::NAN);
    let mut random = Random(15);
    let clean: Sequence<T> = Sequence::random(&mut random, &shape, 600);
    let (mut no_query, mut no_keys) = (clean.clone(), clean.clone());
    no_query.queries.fill(nan);
    let split = 256 * clean.kv.len() / 600;
    no_keys.kv[..split].fill(nan);
    let sequences = [clean, no_query, no_keys];
    for (level, threads) in Level::available().flat_map(|level| [(level, 1), (level, 3)]) {
        let rows = |sequence| {
            let chunk = Chunk { sequence, computed: 599, length: 600 };
            compute(&Step::<T, K>::new(&mut Random(6), shape, &sequences, &[chunk]), level, threads, 0)
        };
        // What it leaves in the threads' memory is not to be found in the others'.
        assert!(rows(0).iter().flatten().all(|value| value.is_finite()), "{level}");
        for broken in [1, 2] {
            assert!(rows(broken).iter().flatten().all(|value| value.is_nan()), "{level}, {broken}");
        }
    }
}

#[test]
fn scores_that_are_no_numbers_give_no_numbers_and_nothing_of_what_ran_before() {
    assert_no_number_gives_no_number::<f32, f32>();
    assert_no_number_gives_no_number::<Bf16, Bf16>();
    assert_no_number_gives_no_number::<Bf16, i8>();
}

#[test]
fn table_entries_below_every_window_are_not_looked_at() {
    let shape = AttentionShape { window_tokens: Some(40), ..shape(2, 1, 16, 8) };
    let mut random = Random(8);
    let sequences: Vec<Sequence<f32>> = vec![Sequence::random(&mut random, &shape, 200)];
    let chunk = || Chunk { sequence: 0, computed: 198, length: 200 };
    let mut step = Step::<f32>::new(&mut random, shape, &sequences, &[chunk()]);
    let expected = compute(&step, Level::detected(), 1, 0);
    // Row 198 sees positions 159..199, so blocks 0 to 18 may be anything.
    step.block_tables[..19].fill(i32::MIN);
    assert_eq!(compute(&step, Level::detected(), 1, 0), expected);
    step.block_tables[19] = i32::MIN;
    let error = AttentionPlan::new(&step.shape, &step.batch(), 1).unwrap_err();
    assert!(matches!(error, KernelError::OutOfRange { argument: "block_tables", position: 19, .. }), "{error}");
}

#[test]
fn contradictory_index_arrays_are_refused() {
    let shape = shape(2, 1, 16, 8);
    let batch =
        AttentionBatch { query_start: &[0, 1], sequence_lengths: &[3], table_offsets: &[0], block_tables: &[0] };
    let plan = |batch: AttentionBatch<'_>| AttentionPlan::new(&shape, &batch, 1);
    assert!(plan(batch).is_ok());
    for (batch, argument) in [
        (AttentionBatch { query_start: &[0], ..batch }, "query_start"),
        (AttentionBatch { query_start: &[1, 2], ..batch }, "query_start"),
        (AttentionBatch { query_start: &[0, -1], ..batch }, "query_start"),
        (AttentionBatch { query_start: &[0, 4], ..batch }, "sequence_lengths"),
        (AttentionBatch { sequence_lengths: &[-3], ..batch }, "sequence_lengths"),
        (AttentionBatch { sequence_lengths: &[9], ..batch }, "block_tables"),
        (AttentionBatch { table_offsets: &[1], ..batch }, "block_tables"),
        (AttentionBatch { table_offsets: &[2], ..batch }, "table_offsets"),
        (AttentionBatch { table_offsets: &[-1], ..batch }, "table_offsets"),
        (AttentionBatch { block_tables: &[1], ..batch }, "block_tables"),
        (AttentionBatch { block_tables: &[-1], ..batch }, "block_tables"),
    ] {
        match plan(batch) {
            Err(
                KernelError::Length { argument: given, .. }
                | KernelError::OutOfRange { argument: given, .. }
                | KernelError::Unsupported { argument: given, .. },
            ) => assert_eq!(given, argument),
            other => panic!("{batch:?} gave {other:?}"),
        }
    }
}

#[test]
fn unsupported_shapes_and_wrong_buffers_are_refused() {
    let good = shape(4, 2, 16, 8);
    let batch =
        AttentionBatch { query_start: &[0, 1], sequence_lengths: &[3], table_offsets: &[0], block_tables: &[0] };
    for bad in [
        AttentionShape { query_heads: 3, ..good },
        AttentionShape { query_heads: 0, ..good },
        AttentionShape { softmax_scale: 0.0, ..good },
        AttentionShape { softmax_scale: f32::NAN, ..good },
        AttentionShape { window_tokens: Some(0), ..good },
    ] {
        assert!(matches!(AttentionPlan::new(&bad, &batch, 1), Err(KernelError::Unsupported { .. })), "{bad:?}");
    }
    let plan = AttentionPlan::new(&good, &batch, 1).unwrap();
    let region = vec![0.0_f32; good.region.elements()];
    let run = |layer: usize, query: usize, region: &[f32]| {
        plan.run(&pool(1), Level::detected(), layer, &vec![0.0; query], region, &mut [0.0; 64])
    };
    assert_eq!(run(0, 64, &region), Ok(()));
    assert!(matches!(run(2, 64, &region), Err(KernelError::Unsupported { argument: "layer", .. })));
    assert!(matches!(run(0, 63, &region), Err(KernelError::Length { argument: "query", .. })));
    let bytes = vec![0_i8; good.region.elements()];
    let outcome = plan.run(&pool(1), Level::detected(), 0, &[0.0_f32; 64], &bytes, &mut [0.0; 64]);
    assert!(matches!(outcome, Err(KernelError::Unsupported { argument: "kv_region", .. })), "{outcome:?}");
    assert!(matches!(run(0, 64, &region[1..]), Err(KernelError::Length { argument: "kv_region", .. })));
}
