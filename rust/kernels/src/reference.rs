//! The kernels' results in plain scalar Rust with f64 sums: the oracle of the tests.
//! Written for obviousness and not for speed; the worker never calls it.
//! Inputs are trusted: a shape that does not fit panics at the index.

use crate::element::Element;
use crate::paged_attention::{AttentionBatch, AttentionShape};

/// Attention of every row over its causal window, as `rows x query_heads x head_dim` of f64.
pub fn paged_attention<T: Element>(
    shape: &AttentionShape,
    batch: &AttentionBatch<'_>,
    layer: usize,
    query: &[T],
    kv_region: &[T],
) -> Vec<f64> {
    let region = &shape.region;
    let (head_dim, group) = (region.head_dim, shape.query_heads / region.kv_heads);
    let mut output = vec![0.0; query.len()];
    for sequence in 0..batch.sequence_lengths.len() {
        let rows = batch.query_start[sequence] as usize..batch.query_start[sequence + 1] as usize;
        let length = batch.sequence_lengths[sequence] as usize;
        for row in rows.clone() {
            let end = length - (rows.end - row) + 1;
            let start = shape.window_tokens.map_or(0, |window| end.saturating_sub(window as usize));
            for head in 0..shape.query_heads {
                let at = (row * shape.query_heads + head) * head_dim;
                let key_offset = |position: usize| {
                    let entry = batch.table_offsets[sequence] as usize + position / region.block_tokens;
                    let block = batch.block_tables[entry] as usize;
                    region.layer_offset(block, layer)
                        + head / group * region.head_elements()
                        + position % region.block_tokens * head_dim
                };
                let dot = |position: usize| {
                    let key = &kv_region[key_offset(position)..][..head_dim];
                    let terms = query[at..at + head_dim].iter().zip(key);
                    terms.map(|(q, k)| f64::from(q.to_f32()) * f64::from(k.to_f32())).sum::<f64>()
                };
                let scores: Vec<f64> =
                    (start..end).map(|position| dot(position) * f64::from(shape.softmax_scale)).collect();
                let maximum = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let total: f64 = scores.iter().map(|score| (score - maximum).exp()).sum();
                for (score, position) in scores.iter().zip(start..end) {
                    let value = &kv_region[key_offset(position) + region.key_to_value()..][..head_dim];
                    for (sum, v) in output[at..at + head_dim].iter_mut().zip(value) {
                        *sum += (score - maximum).exp() / total * f64::from(v.to_f32());
                    }
                }
            }
        }
    }
    output
}

/// RMS norm of one row with the roundings of Hugging Face: normalise, round, multiply by the weight, round.
pub fn rms_norm<T: Element>(input: &[T], weight: &[T], epsilon: f32) -> Vec<T> {
    let squares: f64 = input.iter().map(|x| f64::from(x.to_f32()).powi(2)).sum();
    let scale = 1.0 / (squares / input.len() as f64 + f64::from(epsilon)).sqrt();
    let normal = input.iter().map(|x| T::from_f32((f64::from(x.to_f32()) * scale) as f32));
    normal.zip(weight).map(|(x, w)| T::from_f32(x.to_f32() * w.to_f32())).collect()
}

/// Half-split rotation of the first `2 cosines.len()` elements of one head, in place.
pub fn rotate_head<T: Element>(head: &mut [T], cosines: &[f32], sines: &[f32]) {
    let half = cosines.len();
    for pair in 0..half {
        let (x, y) = (f64::from(head[pair].to_f32()), f64::from(head[pair + half].to_f32()));
        let (cosine, sine) = (f64::from(cosines[pair]), f64::from(sines[pair]));
        head[pair] = T::from_f32((x * cosine - y * sine) as f32);
        head[pair + half] = T::from_f32((y * cosine + x * sine) as f32);
    }
}

/// `silu(gate) * up` in f64.
pub fn silu_and_multiply(gate: f32, up: f32) -> f64 {
    f64::from(gate) / (1.0 + (-f64::from(gate)).exp()) * f64::from(up)
}
