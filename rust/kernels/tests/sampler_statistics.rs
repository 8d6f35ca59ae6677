//! The sampler's tokens follow the softmax, and its noise shows no dependence along any coordinate of the counter.
//! Seeds are fixed, so each test has one outcome; the limits are those that a true random source exceeds once in about
//! ten thousand runs.
#![allow(missing_docs, reason = "a test binary")]

mod support;

use llmscale_kernels::dispatch::Level;
use llmscale_kernels::sampler::{Logits, Purpose, SamplerRow, random_word, sample};
use support::{Random, pool};

/// The value that chi-square with `degrees` of freedom exceeds with probability 1e-4 (Wilson and Hilferty 1931).
fn chi_square_limit(degrees: usize) -> f64 {
    let variance = 2.0 / (9.0 * degrees as f64);
    degrees as f64 * 3.719_f64.mul_add(variance.sqrt(), 1.0 - variance).powi(3)
}

fn chi_square(observed: &[usize], probabilities: &[f64]) -> f64 {
    let total = observed.iter().sum::<usize>() as f64;
    observed
        .iter()
        .zip(probabilities)
        .map(|(&observed, probability)| (observed as f64 - total * probability).powi(2) / (total * probability))
        .sum()
}

fn softmax(logits: &[f32], temperature: f64) -> Vec<f64> {
    let terms: Vec<f64> = logits.iter().map(|&logit| (f64::from(logit) / temperature).exp()).collect();
    let total: f64 = terms.iter().sum();
    terms.into_iter().map(|term| term / total).collect()
}

/// Tokens of one distribution at many positions.
fn draw(logits: &[f32], row: SamplerRow<'_>, positions: std::ops::Range<u32>) -> Vec<u32> {
    let pool = pool(2);
    let batch = (1 << 20) / logits.len();
    let positions: Vec<u32> = positions.collect();
    let mut tokens = Vec::new();
    for positions in positions.chunks(batch) {
        let rows: Vec<SamplerRow<'_>> = positions.iter().map(|&position| SamplerRow { position, ..row }).collect();
        let values: Vec<f32> = rows.iter().flat_map(|_| logits.iter().copied()).collect();
        let logits = Logits { values: &values, vocabulary: logits.len(), row_stride: logits.len() };
        let sampled = sample(&pool, Level::detected(), &logits, &rows).unwrap();
        tokens.extend(sampled.into_iter().map(|row| row.token.unwrap()));
    }
    tokens
}

fn counts(tokens: impl Iterator<Item = usize>, cells: usize) -> Vec<usize> {
    let mut counts = vec![0; cells];
    tokens.for_each(|token| counts[token] += 1);
    counts
}

#[test]
fn a_hundred_thousand_tokens_follow_the_softmax_at_any_temperature() {
    let mut random = Random(1);
    let logits: Vec<f32> = (0..150).map(|_| random.normal()).collect();
    for (temperature, seed) in [(1.0, 7), (0.6, 8), (2.5, 0xdead_beef_0000_0001)] {
        let row = SamplerRow { temperature, seed, ..SamplerRow::default() };
        let observed = counts(draw(&logits, row, 0..100_000).into_iter().map(|token| token as usize), 150);
        let statistic = chi_square(&observed, &softmax(&logits, f64::from(temperature)));
        assert!(statistic < chi_square_limit(149), "temperature {temperature}: {statistic}");
    }
}

#[test]
fn unlikely_tokens_come_as_often_as_they_should() {
    // One token holds nearly everything; 1,000 others share 1e-3, so each has 1e-6 and is decided by the race's far end.
    let mut logits = vec![0.0_f32; 1001];
    logits[0] = (999_000.0_f32).ln();
    let tokens = draw(&logits, SamplerRow { seed: 3, ..SamplerRow::default() }, 0..1_000_000);
    let rare: Vec<u32> = tokens.into_iter().filter(|&token| token != 0).collect();
    // Poisson with mean 1000: five standard deviations are 158.
    assert!(rare.len().abs_diff(1000) < 158, "{}", rare.len());
    let observed = counts(rare.iter().map(|&token| (token as usize - 1) / 100), 10);
    let statistic = chi_square(&observed, &[0.1; 10]);
    assert!(statistic < chi_square_limit(9), "{observed:?}: {statistic}");
}

#[test]
fn a_large_vocabulary_is_sampled_evenly_over_blocks_words_and_lanes() {
    let logits = vec![0.25_f32; 32_000];
    let tokens = draw(&logits, SamplerRow { seed: 11, ..SamplerRow::default() }, 0..64_000);
    for (cells, cell) in
        [(500, (|token| token / 64) as fn(usize) -> usize), (64, |token| token % 64), (4, |token| token / 16 % 4)]
    {
        let observed = counts(tokens.iter().map(|&token| cell(token as usize)), cells);
        let statistic = chi_square(&observed, &vec![1.0 / cells as f64; cells]);
        assert!(statistic < chi_square_limit(cells - 1), "{cells} cells: {statistic}");
    }
}

/// Chi-square of the joint counts of two sequences against the product of their marginal frequencies.
fn dependence(pairs: impl Iterator<Item = (usize, usize)>, cells: usize) -> f64 {
    let joint = counts(pairs.map(|(a, b)| a * cells + b), cells * cells);
    let total = joint.iter().sum::<usize>() as f64;
    let rows: Vec<f64> =
        (0..cells).map(|a| (0..cells).map(|b| joint[a * cells + b]).sum::<usize>() as f64 / total).collect();
    let columns: Vec<f64> =
        (0..cells).map(|b| (0..cells).map(|a| joint[a * cells + b]).sum::<usize>() as f64 / total).collect();
    let expected: Vec<f64> = (0..cells * cells).map(|cell| rows[cell / cells] * columns[cell % cells]).collect();
    chi_square(&joint, &expected)
}

#[test]
fn tokens_at_neighbouring_positions_seeds_and_choices_are_independent() {
    let logits = [0.0_f32, 0.5, -0.5, 1.0, 0.2, 0.0, -1.0];
    let cells = logits.len();
    let base = SamplerRow { seed: 1000, ..SamplerRow::default() };
    let tokens =
        |row| -> Vec<usize> { draw(&logits, row, 0..100_001).into_iter().map(|token| token as usize).collect() };
    let first = tokens(base);
    let limit = chi_square_limit((cells - 1) * (cells - 1));
    for lag in [1, 2, 16, 64] {
        let statistic = dependence(first.iter().copied().zip(first[lag..].iter().copied()), cells);
        assert!(statistic < limit, "lag {lag}: {statistic}");
    }
    for other in [
        SamplerRow { seed: 1001, ..base },
        SamplerRow { seed: 1000 + (1 << 32), ..base },
        SamplerRow { choice: 1, ..base },
        SamplerRow { choice: 1, seed: 1001, ..base },
    ] {
        let statistic = dependence(first.iter().copied().zip(tokens(other)), cells);
        assert!(statistic < limit, "{other:?}: {statistic}");
    }
}

#[test]
fn words_at_neighbouring_counters_are_independent_in_high_and_low_bits() {
    type Word = fn(u32) -> u32;
    let base: Word = |i| random_word(5, 2, i / 300, i % 300, Purpose::Token);
    let neighbours: [(&str, Word); 6] = [
        ("next id", |i| random_word(5, 2, i / 300, i % 300 + 1, Purpose::Token)),
        ("id in the next word", |i| random_word(5, 2, i / 300, i % 300 + 16, Purpose::Token)),
        ("next position", |i| random_word(5, 2, i / 300 + 1, i % 300, Purpose::Token)),
        ("next choice", |i| random_word(5, 3, i / 300, i % 300, Purpose::Token)),
        ("next seed", |i| random_word(6, 2, i / 300, i % 300, Purpose::Token)),
        ("other purpose", |i| random_word(5, 2, i / 300, i % 300, Purpose::Acceptance)),
    ];
    for (name, neighbour) in neighbours {
        for shift in [28, 14, 0] {
            let nibble = |word: u32| (word >> shift & 15) as usize;
            let pairs = (0..300_000).map(|i| (nibble(base(i)), nibble(neighbour(i))));
            let statistic = dependence(pairs, 16);
            assert!(statistic < chi_square_limit(225), "{name}, bits from {shift}: {statistic}");
        }
    }
}
