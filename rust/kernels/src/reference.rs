//! The kernels' results in plain scalar Rust with f64 sums: the oracle of the tests.
//! Written for obviousness and not for speed; the worker never calls it.
//! Inputs are trusted: a shape that does not fit panics at the index.

use crate::element::Element;
use crate::kv_format::KvElement;
use crate::paged_attention::{AttentionBatch, AttentionShape};
use crate::sampler::{MIN_TEMPERATURE, Purpose, RowError, SamplerRow, random_word};
use crate::simd::exact;
use std::collections::{BTreeMap, BTreeSet};

/// Attention of every row over its causal window, as `rows x query_heads x head_dim` of f64.
pub fn paged_attention<T: Element, K: KvElement<T>>(
    shape: &AttentionShape,
    batch: &AttentionBatch<'_>,
    layer: usize,
    query: &[T],
    kv_region: &[K],
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
                // The key (or the value) of a position.
                let stored = |position: usize, is_value: usize| {
                    let entry = batch.table_offsets[sequence] as usize + position / region.block_tokens;
                    let first = region.layer_offset(batch.block_tables[entry] as usize, layer)
                        + head / group * region.head_elements()
                        + is_value * region.key_to_value();
                    let token = position % region.block_tokens;
                    let scale = &kv_region[first + region.scale_offset(token)..][..region.format.scale_elements()];
                    let scale = f64::from(K::scale(scale));
                    let row = &kv_region[first + region.row_offset(token)..][..head_dim];
                    row.iter().map(move |&element| f64::from(element.value()) * scale)
                };
                let dot = |position: usize| {
                    let terms = query[at..at + head_dim].iter().zip(stored(position, 0));
                    terms.map(|(q, k)| f64::from(q.to_f32()) * k).sum::<f64>()
                };
                let scores: Vec<f64> =
                    (start..end).map(|position| dot(position) * f64::from(shape.softmax_scale)).collect();
                let maximum = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let total: f64 = scores.iter().map(|score| (score - maximum).exp()).sum();
                for (score, position) in scores.iter().zip(start..end) {
                    for (sum, v) in output[at..at + head_dim].iter_mut().zip(stored(position, 1)) {
                        *sum += (score - maximum).exp() / total * v;
                    }
                }
            }
        }
    }
    output
}

/// The codes and the scale of one row of a KV region of bytes.
pub fn quantize_row<T: Element>(row: &[T]) -> (Vec<i8>, f32) {
    let largest = row.iter().map(|x| x.to_f32().abs()).fold(0.0, f32::max);
    let factor = 127.0 / largest.max(1e-36);
    (row.iter().map(|x| (x.to_f32() * factor).round_ties_even() as i8).collect(), largest / 127.0)
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

/// The logits of a row after penalties, bias, suppressed tokens and mask.
pub fn changed_logits(row: &SamplerRow<'_>, logits: &[f32]) -> Vec<f32> {
    let counts: BTreeMap<u32, u32> = row.generated_counts.iter().copied().filter(|&(_, count)| count > 0).collect();
    let mut seen: BTreeSet<u32> = row.prompt_tokens.iter().copied().collect();
    seen.extend(counts.keys());
    let mut changed = logits.to_vec();
    for (token, logit) in (0_u32..).zip(&mut changed) {
        if seen.contains(&token) {
            let penalty = row.repetition_penalty;
            *logit = if *logit > 0.0 { *logit / penalty } else { *logit * penalty };
        }
        if let Some(&count) = counts.get(&token) {
            *logit -= row.frequency_penalty * count as f32;
            *logit -= row.presence_penalty;
        }
        for &(_, bias) in row.logit_bias.iter().filter(|entry| entry.0 == token) {
            *logit += bias;
        }
        let allowed = row.allowed.is_none_or(|words| words[token as usize / 32] >> (token % 32) & 1 == 1);
        if row.suppressed.contains(&token) || !allowed {
            *logit = f32::NEG_INFINITY;
        }
    }
    changed
}

/// The tokens that a row may sample and their scaled scores, by sorting the whole vocabulary.
pub fn kept_tokens(row: &SamplerRow<'_>, changed: &[f32]) -> Vec<(u32, f32)> {
    let greatest = changed.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let inverse_temperature = 1.0 / row.temperature;
    let mut kept: Vec<(u32, f32)> =
        (0..).zip(changed).map(|(token, logit)| (token, (logit - greatest) * inverse_temperature)).collect();
    kept.retain(|&(_, score)| score > f32::NEG_INFINITY);
    kept.sort_by(|a, b| b.1.partial_cmp(&a.1).expect("scores are not NaN").then(a.0.cmp(&b.0)));
    if row.min_p > 0.0 {
        let least = exact::ln_scalar(row.min_p.max(f32::MIN_POSITIVE));
        kept.retain(|&(_, score)| score >= least);
    }
    if row.top_k > 0 && (row.top_k as usize) < kept.len() {
        let least = kept[row.top_k as usize - 1].1;
        kept.retain(|&(_, score)| score >= least);
    }
    if row.top_p < 1.0 {
        let mass = |score: f32| f64::from(exact::exp_scalar(score));
        let total: f64 = kept.iter().map(|&(_, score)| mass(score)).sum();
        let mut before = 0.0;
        let mut count = 0;
        for &(_, score) in &kept {
            if count > 0 && before >= f64::from(row.top_p) * total {
                break;
            }
            before += mass(score);
            count += 1;
        }
        kept.truncate(count);
    }
    kept
}

/// The token of a row: every kept token draws its noise, the greatest key wins, the lower id among equals.
///
/// # Errors
/// As the sampler's rows.
pub fn sample(row: &SamplerRow<'_>, logits: &[f32]) -> Result<u32, RowError> {
    if let Some(token) = logits.iter().position(|logit| logit.is_nan() || *logit == f32::INFINITY) {
        return Err(RowError::NotFinite { token: token as u32 });
    }
    let changed = changed_logits(row, logits);
    let greatest = changed.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    if greatest == f32::NEG_INFINITY {
        return Err(RowError::NoCandidate);
    }
    if row.temperature < MIN_TEMPERATURE {
        return Ok(changed.iter().position(|&logit| logit >= greatest).expect("the maximum is present") as u32);
    }
    let key = |&(token, score): &(u32, f32)| {
        score + exact::gumbel_scalar(random_word(row.seed, row.choice, row.position, token, Purpose::Token))
    };
    let kept = kept_tokens(row, &changed);
    let winner = kept.iter().map(|entry| (key(entry), entry.0)).max_by(|a, b| a.0.total_cmp(&b.0).then(b.1.cmp(&a.1)));
    Ok(winner.expect("at least one token is kept").1)
}
