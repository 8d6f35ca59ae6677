//! The sampler against a reference that sorts everything and races every token: equal tokens at every level, in every
//! batch, on any number of threads. Its statistics are in `sampler_statistics.rs`.
#![allow(missing_docs, reason = "a test binary")]

mod support;

use llmscale_kernels::dispatch::Level;
use llmscale_kernels::element::{Bf16, Element};
use llmscale_kernels::error::KernelError;
use llmscale_kernels::reference;
use llmscale_kernels::sampler::{Logits, RowError, SampledRow, SamplerRow, sample};
use proptest::prelude::*;
use support::{Random, pool};

fn sample_rows<T: Element>(level: Level, threads: usize, values: &[T], rows: &[SamplerRow<'_>]) -> Vec<SampledRow> {
    let vocabulary = values.len() / rows.len();
    sample(&pool(threads), level, &Logits { values, vocabulary, row_stride: vocabulary }, rows).unwrap()
}

fn sample_one(logits: &[f32], row: SamplerRow<'_>) -> Result<u32, RowError> {
    let mut tokens = Level::available().map(|level| sample_rows(level, 1, logits, &[row])[0].token);
    let first = tokens.next().unwrap();
    assert!(tokens.all(|token| token == first), "levels differ");
    first
}

/// The owned parts of a random row.
#[derive(Debug)]
struct RowCase {
    logits: Vec<f32>,
    parameters: SamplerRow<'static>,
    suppressed: Vec<u32>,
    logit_bias: Vec<(u32, f32)>,
    allowed: Option<Vec<u32>>,
    prompt_tokens: Vec<u32>,
    generated_counts: Vec<(u32, u32)>,
}

impl RowCase {
    fn random(random: &mut Random, vocabulary: usize) -> Self {
        // Coarse steps make ties common, wide ranges make blocks that can be skipped.
        let range = [0.0, 1.0, 4.0, 30.0][random.below(4)];
        let step = [0.0, 0.5, 0.01][random.below(3)];
        let quantised = |x: f32| if step > 0.0 { (x / step).round() * step } else { x };
        let logits: Vec<f32> = (0..vocabulary)
            .map(|_| if random.below(50) == 0 { f32::NEG_INFINITY } else { quantised(random.normal() * range) })
            .collect();
        let mut pick =
            |chance: usize, value: f32, otherwise: f32| if random.below(chance) == 0 { value } else { otherwise };
        let parameters = SamplerRow {
            temperature: pick(5, 0.0, 1.0) * pick(2, 0.6, 1.7),
            top_p: pick(2, 1.0, 0.9),
            min_p: pick(3, 0.02, 0.0),
            repetition_penalty: pick(3, 1.3, 1.0),
            presence_penalty: pick(3, 0.7, 0.0),
            frequency_penalty: pick(3, -0.4, 0.0),
            ..SamplerRow::default()
        };
        let parameters = SamplerRow {
            top_p: if random.below(8) == 0 { 0.0 } else { parameters.top_p * (0.5 + random.below(100) as f32 / 200.0) },
            top_k: if random.below(2) == 0 { 0 } else { random.below(vocabulary + 3) as u32 },
            seed: random.next(),
            choice: random.below(3) as u32,
            position: random.next() as u32,
            ..parameters
        };
        let mut tokens = |chance: usize| -> Vec<u32> {
            let mut tokens: Vec<u32> = match random.below(chance) {
                0 => (0..random.below(20)).map(|_| random.below(vocabulary) as u32).collect(),
                _ => Vec::new(),
            };
            tokens.sort_unstable();
            tokens.dedup();
            tokens
        };
        let (suppressed, biased, prompt_tokens, generated) = (tokens(4), tokens(4), tokens(2), tokens(2));
        let logit_bias = biased.into_iter().map(|token| (token, random.normal() * 3.0)).collect();
        let generated_counts = generated.into_iter().map(|token| (token, random.below(4) as u32)).collect();
        let allowed = (random.below(5) == 0).then(|| {
            (0..vocabulary.div_ceil(32)).map(|_| [0, u32::MAX, random.next() as u32][random.below(3)]).collect()
        });
        Self { logits, parameters, suppressed, logit_bias, allowed, prompt_tokens, generated_counts }
    }

    fn row(&self) -> SamplerRow<'_> {
        SamplerRow {
            suppressed: &self.suppressed,
            logit_bias: &self.logit_bias,
            allowed: self.allowed.as_deref(),
            prompt_tokens: &self.prompt_tokens,
            generated_counts: &self.generated_counts,
            ..self.parameters
        }
    }
}

fn check_batch(seed: u64, vocabulary: usize, count: usize) {
    let mut random = Random(seed);
    let cases: Vec<RowCase> = (0..count).map(|_| RowCase::random(&mut random, vocabulary)).collect();
    let rows: Vec<SamplerRow<'_>> = cases.iter().map(RowCase::row).collect();
    let logits: Vec<f32> = cases.iter().flat_map(|case| case.logits.clone()).collect();
    let halves: Vec<Bf16> = logits.iter().map(|&x| Bf16::from_f32(x)).collect();
    let expected = |logits: Vec<f32>| -> Vec<Result<u32, RowError>> {
        rows.iter().zip(logits.chunks(vocabulary)).map(|(row, logits)| reference::sample(row, logits)).collect()
    };
    let whole = expected(logits.clone());
    let half = expected(halves.iter().map(|x| x.to_f32()).collect());
    for level in Level::available() {
        for threads in [1, 3] {
            let tokens = |sampled: Vec<SampledRow>| sampled.into_iter().map(|row| row.token).collect::<Vec<_>>();
            let given = tokens(sample_rows(level, threads, &logits, &rows));
            for (index, (given, expected)) in given.iter().zip(&whole).enumerate() {
                assert_eq!(given, expected, "{level}: {:?}", rows[index]);
            }
            assert_eq!(tokens(sample_rows(level, threads, &halves, &rows)), half, "{level}, bf16");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn every_level_batch_and_thread_count_gives_the_token_of_the_reference(
        seed in any::<u64>(),
        vocabulary in prop_oneof![1_usize..200, 200_usize..5000],
        count in 1_usize..6,
    ) {
        check_batch(seed, vocabulary, count);
    }
}

#[test]
fn large_flat_and_peaked_vocabularies_give_the_token_of_the_reference() {
    for seed in 0..4 {
        check_batch(seed, 50_257, 3);
    }
}

#[test]
fn greedy_takes_the_lowest_id_among_equals() {
    let greedy = SamplerRow { temperature: 0.0, ..SamplerRow::default() };
    for vocabulary in [1, 5, 64, 65, 1000] {
        for winners in
            [vec![0], vec![vocabulary - 1], vec![vocabulary / 2, vocabulary - 1], vec![vocabulary / 3, vocabulary / 2]]
        {
            let mut logits = vec![-1.0; vocabulary];
            for &winner in &winners {
                logits[winner] = 2.0;
            }
            assert_eq!(sample_one(&logits, greedy), Ok(winners[0] as u32));
        }
    }
    assert_eq!(sample_one(&[0.5, 0.5, 0.5], SamplerRow { temperature: 9e-6, ..greedy }), Ok(0));
}

/// The set of tokens that come out over many positions.
fn reachable(logits: &[f32], row: SamplerRow<'_>) -> Vec<u32> {
    let rows: Vec<SamplerRow<'_>> = (0..2000).map(|position| SamplerRow { position, ..row }).collect();
    let values: Vec<f32> = rows.iter().flat_map(|_| logits.iter().copied()).collect();
    let mut tokens: Vec<u32> =
        sample_rows(Level::detected(), 1, &values, &rows).into_iter().map(|row| row.token.unwrap()).collect();
    tokens.sort_unstable();
    tokens.dedup();
    tokens
}

#[test]
fn top_k_keeps_all_tokens_that_equal_the_last_kept_one() {
    let logits = [1.0, 3.0, 2.0, 2.0, 0.0, 2.0];
    let top_k = |top_k| reachable(&logits, SamplerRow { top_k, ..SamplerRow::default() });
    assert_eq!(top_k(1), [1]);
    assert_eq!(top_k(2), [1, 2, 3, 5]);
    assert_eq!(top_k(4), [1, 2, 3, 5]);
    assert_eq!(top_k(5), [0, 1, 2, 3, 5]);
    assert_eq!(top_k(0), [0, 1, 2, 3, 4, 5]);
}

#[test]
fn top_p_keeps_the_fewest_tokens_and_takes_lower_ids_first_among_equals() {
    // Probabilities 0.1, 0.3, 0.2, 0.2, 0.2.
    let logits = [0.1_f32, 0.3, 0.2, 0.2, 0.2].map(f32::ln);
    let top_p = |top_p| reachable(&logits, SamplerRow { top_p, ..SamplerRow::default() });
    assert_eq!(top_p(0.0), [1]);
    assert_eq!(top_p(0.29), [1]);
    assert_eq!(top_p(0.31), [1, 2]);
    assert_eq!(top_p(0.51), [1, 2, 3]);
    assert_eq!(top_p(0.71), [1, 2, 3, 4]);
    assert_eq!(top_p(0.91), [0, 1, 2, 3, 4]);
    // After top-k the rest is renormalised: 0.3 of 0.9 reaches a third.
    let row = SamplerRow { top_k: 2, top_p: 0.32, ..SamplerRow::default() };
    assert_eq!(reachable(&logits, row), [1]);
}

#[test]
fn min_p_keeps_tokens_at_least_that_likely_relative_to_the_best() {
    let logits = [0.5_f32, 0.26, 0.14, 0.1].map(f32::ln);
    let min_p = |min_p| reachable(&logits, SamplerRow { min_p, ..SamplerRow::default() });
    assert_eq!(min_p(0.5), [0, 1]);
    assert_eq!(min_p(0.53), [0]);
    assert_eq!(min_p(0.27), [0, 1, 2]);
    assert_eq!(min_p(1.0), [0]);
    assert_eq!(min_p(0.0), [0, 1, 2, 3]);
}

#[test]
fn penalties_count_a_token_of_prompt_and_output_once_and_ignore_zero_counts() {
    let logits = [2.0, 1.9, -1.0, -1.1];
    let row = SamplerRow {
        temperature: 0.0,
        repetition_penalty: 1.1,
        prompt_tokens: &[0, 2],
        generated_counts: &[(0, 2), (1, 0)],
        ..SamplerRow::default()
    };
    let expected = [2.0_f32 / 1.1, 1.9, -1.1, -1.1];
    assert_eq!(reference::changed_logits(&row, &logits), expected);
    assert_eq!(sample_one(&logits, row), Ok(1));
    let row = SamplerRow { repetition_penalty: 1.0, frequency_penalty: 0.04, ..row };
    assert_eq!(sample_one(&logits, row), Ok(0));
    let row = SamplerRow { frequency_penalty: 0.04, presence_penalty: 0.05, ..row };
    assert_eq!(sample_one(&logits, row), Ok(1));
}

#[test]
fn broken_rows_report_themselves_and_leave_the_others_alone() {
    let vocabulary = 200;
    let good: Vec<f32> = (0..vocabulary).map(|token| token as f32 * 0.01).collect();
    let mut values =
        [good.clone(), good.clone(), good.clone(), vec![f32::NEG_INFINITY; vocabulary], good.clone()].concat();
    values[vocabulary + 3] = f32::NAN;
    values[2 * vocabulary + 199] = f32::INFINITY;
    let everything: Vec<u32> = (0..vocabulary as u32).collect();
    let mut rows = [SamplerRow::default(); 5];
    rows[4].suppressed = &everything;
    for level in Level::available() {
        let sampled = sample_rows(level, 2, &values, &rows);
        let tokens: Vec<Result<u32, RowError>> = sampled.into_iter().map(|row| row.token).collect();
        assert_eq!(tokens[0], reference::sample(&rows[0], &good));
        assert_eq!(tokens[1], Err(RowError::NotFinite { token: 3 }));
        assert_eq!(tokens[2], Err(RowError::NotFinite { token: 199 }));
        assert_eq!(tokens[3], Err(RowError::NoCandidate));
        assert_eq!(tokens[4], Err(RowError::NoCandidate));
    }
}

#[test]
fn logprobs_are_those_of_the_unchanged_logits_and_ties_are_in_order_of_id() {
    let mut random = Random(9);
    let mut logits: Vec<f32> = (0..1000).map(|_| random.normal() * 3.0).collect();
    logits[17] = f32::NEG_INFINITY;
    for token in [30, 700, 701] {
        logits[token] = 11.0;
    }
    let total: f64 = logits.iter().map(|&logit| f64::from(logit).exp()).sum();
    let truth = |token: u32| f64::from(logits[token as usize]) - total.ln();
    let row = SamplerRow {
        temperature: 0.5,
        top_k: 3,
        logprobs: Some(5),
        suppressed: &[30],
        logit_bias: &[(5, 100.0)],
        ..SamplerRow::default()
    };
    for level in Level::available() {
        let sampled = sample_rows(level, 1, &logits, &[row]).remove(0);
        let logprobs = sampled.logprobs.unwrap();
        assert_eq!(sampled.token, Ok(5));
        assert!((f64::from(logprobs.chosen) - truth(5)).abs() < 2e-6);
        assert_eq!(logprobs.top.len(), 5);
        assert_eq!(logprobs.top[..3].iter().map(|entry| entry.0).collect::<Vec<_>>(), [30, 700, 701]);
        assert!(logprobs.top.windows(2).all(|pair| pair[0].1 >= pair[1].1));
        for (token, logprob) in logprobs.top {
            assert!((f64::from(logprob) - truth(token)).abs() < 2e-6, "{level} {token} {logprob}");
        }
    }
    let all = SamplerRow { logprobs: Some(5000), temperature: 0.0, ..SamplerRow::default() };
    let logprobs = sample_rows(Level::detected(), 1, &logits, &[all]).remove(0).logprobs.unwrap();
    assert_eq!(logprobs.top.len(), 1000);
    assert_eq!(logprobs.top[999], (17, f32::NEG_INFINITY));
    let none = SamplerRow { logprobs: Some(0), ..all };
    let logprobs = sample_rows(Level::detected(), 1, &logits, &[none]).remove(0).logprobs.unwrap();
    assert!(logprobs.top.is_empty() && logprobs.chosen > -3.0);
}

#[test]
fn rows_may_be_padded_and_the_padding_is_not_looked_at() {
    let values = [1.0, 2.0, f32::NAN, 4.0, 3.0];
    let logits = Logits { values: &values, vocabulary: 2, row_stride: 3 };
    let greedy = SamplerRow { temperature: 0.0, ..SamplerRow::default() };
    let sampled = sample(&pool(1), Level::detected(), &logits, &[greedy; 2]).unwrap();
    assert_eq!(sampled.iter().map(|row| row.token).collect::<Vec<_>>(), [Ok(1), Ok(0)]);
}

#[test]
fn parameters_out_of_range_are_refused_by_name() {
    let logits = [0.0_f32; 40];
    let run = |row: SamplerRow<'_>| {
        let logits = Logits { values: &logits, vocabulary: 20, row_stride: 20 };
        sample(&pool(1), Level::detected(), &logits, &[SamplerRow::default(), row])
    };
    let good = SamplerRow::default();
    assert!(run(good).is_ok());
    for (row, name) in [
        (SamplerRow { temperature: -0.1, ..good }, "temperature"),
        (SamplerRow { temperature: f32::INFINITY, ..good }, "temperature"),
        (SamplerRow { top_p: 1.01, ..good }, "top_p"),
        (SamplerRow { top_p: f32::NAN, ..good }, "top_p"),
        (SamplerRow { min_p: -0.5, ..good }, "min_p"),
        (SamplerRow { repetition_penalty: 0.0, ..good }, "repetition_penalty"),
        (SamplerRow { presence_penalty: f32::NAN, ..good }, "presence_penalty"),
        (SamplerRow { frequency_penalty: f32::INFINITY, ..good }, "frequency_penalty"),
        (SamplerRow { logit_bias: &[(1, f32::NAN)], ..good }, "logit_bias"),
    ] {
        match run(row) {
            Err(KernelError::SamplingParameter { row: 1, parameter, .. }) => assert_eq!(parameter, name),
            other => panic!("{name} gave {other:?}"),
        }
    }
    for (row, name) in [
        (SamplerRow { suppressed: &[20], ..good }, "suppressed"),
        (SamplerRow { logit_bias: &[(99, 0.0)], ..good }, "logit_bias"),
        (SamplerRow { prompt_tokens: &[3, 20], ..good }, "prompt_tokens"),
        (SamplerRow { generated_counts: &[(20, 1)], ..good }, "generated_counts"),
    ] {
        assert!(matches!(run(row), Err(KernelError::OutOfRange { argument, .. }) if argument == name), "{name}");
    }
    for row in
        [SamplerRow { prompt_tokens: &[3, 3], ..good }, SamplerRow { generated_counts: &[(3, 1), (2, 1)], ..good }]
    {
        assert!(matches!(run(row), Err(KernelError::Unsupported { .. })));
    }
    assert!(matches!(run(SamplerRow { allowed: Some(&[1, 2]), ..good }), Err(KernelError::Length { .. })));
}
