//! Norm, rotary embedding with KV write, activation and embedding against the scalar reference, at every level.
#![allow(missing_docs, reason = "a test binary")]

mod support;

use llmscale_kernels::activation::silu_and_multiply;
use llmscale_kernels::dispatch::Level;
use llmscale_kernels::element::{Bf16, Element};
use llmscale_kernels::embedding::gather_rows;
use llmscale_kernels::error::KernelError;
use llmscale_kernels::kv_format::{KvElement, KvFormat};
use llmscale_kernels::kv_region::{KvRegionShape, SlotMapping};
use llmscale_kernels::norm::{add_rms_norm, rms_norm};
use llmscale_kernels::reference;
use llmscale_kernels::rope_cache::{HeadNorms, RopeCacheInput, RotaryTable, rope_and_cache};
use support::{Random, pool};

const EPSILON: f32 = 1e-5;

/// Distance in steps of the format.
fn steps<T: Element>(a: T, b: T) -> u32 {
    let ordered = |x: T| {
        let bits = x.to_f32().to_bits() as i32;
        if bits < 0 { i32::MIN - bits } else { bits }
    };
    ordered(a).abs_diff(ordered(b)) >> if T::IS_BF16 { 16 } else { 0 }
}

fn assert_close<T: Element>(given: &[T], expected: &[T], max_steps: u32, what: &str) {
    assert_eq!(given.len(), expected.len());
    for (index, (&given, &expected)) in given.iter().zip(expected).enumerate() {
        let distance = steps(given, expected);
        assert!(distance <= max_steps, "{what}: element {index} is {given:?} for {expected:?}");
    }
}

fn check_norm<T: Element>(hidden: usize, max_steps: u32) {
    let mut random = Random(hidden as u64);
    let rows = 5;
    let (input, weight) = (random.elements::<T>(rows * hidden), random.elements::<T>(hidden));
    let residual = random.elements::<T>(rows * hidden);
    let sum: Vec<T> = input.iter().zip(&residual).map(|(a, b)| T::from_f32(a.to_f32() + b.to_f32())).collect();
    let pool = pool(2);
    for level in Level::available() {
        let mut output = vec![T::default(); rows * hidden];
        rms_norm(&pool, level, &input, &weight, EPSILON, &mut output).unwrap();
        let expected: Vec<T> =
            input.chunks(hidden).flat_map(|row| reference::rms_norm(row, &weight, EPSILON)).collect();
        assert_close(&output, &expected, max_steps, &format!("norm of {hidden} at {level}"));

        let mut added = residual.clone();
        add_rms_norm(&pool, level, &input, &mut added, &weight, EPSILON, &mut output).unwrap();
        assert_close(&added, &sum, 0, &format!("residual of {hidden} at {level}"));
        let expected: Vec<T> = sum.chunks(hidden).flat_map(|row| reference::rms_norm(row, &weight, EPSILON)).collect();
        assert_close(&output, &expected, max_steps, &format!("norm with residual of {hidden} at {level}"));
    }
}

#[test]
fn rms_norm_matches_the_reference_at_any_width() {
    for hidden in [1, 2, 7, 8, 15, 16, 33, 64, 100, 576, 2048] {
        check_norm::<f32>(hidden, 8);
        // The f32 sum may round a value that lies at a bf16 tie to the other side: one step, doubled by the weight.
        check_norm::<Bf16>(hidden, 2);
    }
}

#[test]
fn a_row_is_normalised_alike_alone_and_among_others() {
    let mut random = Random(1);
    let hidden = 100;
    let (input, weight) = (random.elements::<Bf16>(64 * hidden), random.elements::<Bf16>(hidden));
    for level in Level::available() {
        let mut all = vec![Bf16::default(); input.len()];
        rms_norm(&pool(3), level, &input, &weight, EPSILON, &mut all).unwrap();
        for (row, expected) in input.chunks(hidden).zip(all.chunks(hidden)) {
            let mut alone = vec![Bf16::default(); hidden];
            rms_norm(&pool(1), level, row, &weight, EPSILON, &mut alone).unwrap();
            assert_eq!(alone, expected);
        }
    }
}

fn check_activation<T: Element>(max_steps: u32) {
    let mut random = Random(2);
    for ffn in [1, 7, 8, 16, 31, 100, 1536] {
        let rows = 4;
        let gate_up: Vec<T> = (0..rows * 2 * ffn).map(|_| T::from_f32(random.signed() * 20.0)).collect();
        let expected: Vec<T> = gate_up
            .chunks(2 * ffn)
            .flat_map(|row| row[..ffn].iter().zip(&row[ffn..]))
            .map(|(gate, up)| T::from_f32(reference::silu_and_multiply(gate.to_f32(), up.to_f32()) as f32))
            .collect();
        let mut first = None;
        for level in Level::available() {
            let mut output = vec![T::default(); rows * ffn];
            silu_and_multiply(&pool(2), level, &gate_up, ffn, &mut output).unwrap();
            assert_close(&output, &expected, max_steps, &format!("ffn {ffn} at {level}"));
            let output: Vec<u32> = output.iter().map(|x| x.to_f32().to_bits()).collect();
            assert_eq!(*first.get_or_insert(output.clone()), output, "levels differ at {level}");
        }
    }
}

#[test]
fn silu_times_up_stays_within_its_documented_error_and_equals_itself_at_every_level() {
    check_activation::<f32>(4);
    check_activation::<Bf16>(1);
}

#[test]
fn extreme_gates_give_finite_results_and_nan_stays_nan() {
    let gate_up = [-1e30_f32, -100.0, -0.0, 0.0, 100.0, 1e30, f32::NAN, 3.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0];
    for level in Level::available() {
        let mut output = [1.0_f32; 8];
        silu_and_multiply(&pool(1), level, &gate_up, 8, &mut output).unwrap();
        assert!(output[1].abs() < 1e-35 && output[2] == 0.0 && output[3] == 0.0, "{output:?}");
        assert_eq!(output[4..6], [100.0, 1e30]);
        assert!(output[0].is_finite() && output[6].is_nan());
    }
}

#[test]
fn gather_copies_the_named_rows_and_refuses_ids_outside_the_table() {
    let mut random = Random(3);
    let table = random.elements::<Bf16>(50 * 24);
    let ids = [0, 49, 7, 7, 20];
    let mut output = vec![Bf16::default(); ids.len() * 24];
    gather_rows(&pool(2), &table, 24, &ids, &mut output).unwrap();
    for (row, id) in output.chunks(24).zip(ids) {
        assert_eq!(row, &table[id as usize * 24..][..24]);
    }
    let before = output.clone();
    for (ids, position, value) in [([1, 50, 2, 3, 4], 1, 50), ([1, 2, 3, 4, -1], 4, -1)] {
        let error = gather_rows(&pool(1), &table, 24, &ids, &mut output).unwrap_err();
        assert_eq!(error, KernelError::OutOfRange { argument: "token_ids", position, value, limit: 50 });
    }
    assert_eq!(output, before);
}

/// Where the rows of the tests of the cache go.
const CACHE_SLOTS: [i32; 6] = [5, 17, 0, 31, 8, 6];

struct RopeCase {
    query_heads: usize,
    region: KvRegionShape,
    rotary_dim: usize,
    with_norms: bool,
}

fn check_rope<T: Element>(case: &RopeCase, max_steps: u32) {
    let mut random = Random(case.rotary_dim as u64);
    let region = case.region;
    let (head_dim, half, positions_in_table) = (region.head_dim, case.rotary_dim / 2, 40);
    let slots = CACHE_SLOTS;
    let rows = slots.len();
    let heads = case.query_heads + 2 * region.kv_heads;
    let qkv = random.elements::<T>(rows * heads * head_dim);
    let positions: Vec<i32> = (0..rows).map(|_| random.below(positions_in_table) as i32).collect();
    let angle = |i: usize| (i / half) as f32 * 10_000_f32.powf(-((i % half) as f32) / half as f32);
    let cosines: Vec<f32> = (0..positions_in_table * half).map(|i| angle(i).cos()).collect();
    let sines: Vec<f32> = (0..positions_in_table * half).map(|i| angle(i).sin()).collect();
    let (query_norm, key_norm) = (random.elements::<T>(head_dim), random.elements::<T>(head_dim));
    let before = random.elements::<T>(region.elements());

    let mut expected_query = Vec::new();
    let mut expected_region = before.clone();
    let mapping = SlotMapping::new(region, &slots).unwrap();
    let layer = 1;
    for row in 0..rows {
        for head in 0..heads {
            let mut vector = qkv[(row * heads + head) * head_dim..][..head_dim].to_vec();
            let (is_query, is_key) = (head < case.query_heads, head < case.query_heads + region.kv_heads);
            if is_key {
                if case.with_norms {
                    let weight = if is_query { &query_norm } else { &key_norm };
                    vector = reference::rms_norm(&vector, weight, EPSILON);
                }
                let at = positions[row] as usize * half;
                reference::rotate_head(&mut vector, &cosines[at..at + half], &sines[at..at + half]);
            }
            if is_query {
                expected_query.extend(vector);
            } else {
                let part = head - case.query_heads;
                let offset = mapping.key_offsets(row, layer).0
                    + part / region.kv_heads * region.key_to_value()
                    + part % region.kv_heads * region.head_elements();
                expected_region[offset..offset + head_dim].copy_from_slice(&vector);
            }
        }
    }

    let input = RopeCacheInput {
        qkv: &qkv,
        query_heads: case.query_heads,
        positions: &positions,
        table: RotaryTable { cosines: &cosines, sines: &sines, rotary_dim: case.rotary_dim },
        norms: case.with_norms.then_some(HeadNorms { query: &query_norm, key: &key_norm, epsilon: EPSILON }),
        slots: &mapping,
        layer,
    };
    for level in Level::available() {
        let mut query = vec![T::default(); expected_query.len()];
        let mut region = before.clone();
        rope_and_cache(&pool(2), level, &input, &mut query, &mut region).unwrap();
        // Near a zero of the rotation, steps of the result are smaller than those of its two terms.
        let close = |given: &[T], expected: &[T], what: &str| {
            for (index, (&given, &expected)) in given.iter().zip(expected).enumerate() {
                let small = (given.to_f32() - expected.to_f32()).abs() < 1e-6;
                assert!(small || steps(given, expected) <= max_steps, "{what} {index}: {given:?} for {expected:?}");
            }
        };
        close(&query, &expected_query, &format!("query at {level}"));
        close(&region, &expected_region, &format!("region at {level}"));
        check_bytes(&input, level, &region);
    }
}

/// A region of bytes gets the codes and scales of what `plain` got.
fn check_bytes<T: Element>(input: &RopeCacheInput<'_, T>, level: Level, plain: &[T]) {
    let shape = KvRegionShape { format: KvFormat::Bytes, ..*input.slots.shape() };
    let slots: Vec<i32> = CACHE_SLOTS.to_vec();
    let slots = SlotMapping::new(shape, &slots).unwrap();
    let mut query = vec![T::default(); slots.rows() * input.query_heads * shape.head_dim];
    let mut region = vec![55_i8; shape.elements()];
    let mut expected = region.clone();
    for row in 0..slots.rows() {
        let (from, (to, scale_to)) = (input.slots.key_offsets(row, input.layer).0, slots.key_offsets(row, input.layer));
        for part in 0..2 * shape.kv_heads {
            let source = &plain[from + part * input.slots.shape().head_elements()..][..shape.head_dim];
            let (codes, scale) = reference::quantize_row(source);
            let further = part * shape.head_elements();
            expected[to + further..][..shape.head_dim].copy_from_slice(&codes);
            let target = &mut expected[scale_to + further..][..4];
            target.copy_from_slice(&scale.to_ne_bytes().map(u8::cast_signed));
            assert_eq!(<i8 as KvElement<T>>::scale(target).to_bits(), scale.to_bits());
        }
    }
    rope_and_cache(&pool(2), level, &RopeCacheInput { slots: &slots, ..*input }, &mut query, &mut region).unwrap();
    assert!(region == expected, "bytes at {level}");
}

#[test]
fn rotation_norms_and_cache_writes_match_the_reference() {
    for (query_heads, kv_heads, head_dim, rotary_dim) in
        [(9, 3, 64, 64), (4, 1, 40, 40), (2, 2, 80, 32), (6, 2, 48, 10), (2, 1, 128, 128), (1, 1, 8, 2)]
    {
        for with_norms in [false, true] {
            let region = KvRegionShape {
                blocks: 4,
                layers: 2,
                kv_heads,
                block_tokens: 8,
                head_dim,
                format: KvFormat::Activations,
            };
            let case = RopeCase { query_heads, region, rotary_dim, with_norms };
            check_rope::<f32>(&case, 16);
            check_rope::<Bf16>(&case, 2);
        }
    }
}

#[test]
fn positions_past_the_table_and_odd_rotations_are_refused_before_anything_is_written() {
    let region = KvRegionShape {
        blocks: 1,
        layers: 1,
        kv_heads: 1,
        block_tokens: 8,
        head_dim: 8,
        format: KvFormat::Activations,
    };
    let slots = SlotMapping::new(region, &[0]).unwrap();
    let table = RotaryTable { cosines: &[1.0; 8], sines: &[0.0; 8], rotary_dim: 8 };
    let input = RopeCacheInput {
        qkv: &[1.0_f32; 24],
        query_heads: 1,
        positions: &[1],
        table,
        norms: None,
        slots: &slots,
        layer: 0,
    };
    let run = |input: &RopeCacheInput<'_, f32>| {
        let (mut query, mut kv) = ([0.0; 8], [0.0; 128]);
        let outcome = rope_and_cache(&pool(1), Level::detected(), input, &mut query, &mut kv);
        assert_eq!(outcome.is_ok(), query[0] > 0.5, "a refused call has written");
        outcome
    };
    assert_eq!(run(&input), Ok(()));
    let position = KernelError::OutOfRange { argument: "positions", position: 0, value: 2, limit: 2 };
    assert_eq!(run(&RopeCacheInput { positions: &[2], ..input }), Err(position));
    for rotary_dim in [0, 3, 10] {
        let error = run(&RopeCacheInput { table: RotaryTable { rotary_dim, ..table }, ..input }).unwrap_err();
        assert!(matches!(error, KernelError::Unsupported { argument: "rotary_dim", .. }), "{error}");
    }
    assert!(matches!(run(&RopeCacheInput { layer: 1, ..input }), Err(KernelError::Unsupported { .. })));
    assert!(matches!(run(&RopeCacheInput { qkv: &[1.0; 23], ..input }), Err(KernelError::Length { .. })));
}
