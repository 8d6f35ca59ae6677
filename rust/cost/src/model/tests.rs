//! The fit on devices that are known, and its bounds. `tests/reference.rs` holds it against a fit in floats.

use super::{CostModel, LEAST_NS, MOST_NS};
use crate::shape::StepShape;
use proptest::prelude::*;

/// A device that is exactly linear, with noise and stalls on demand.
struct Device {
    base_ns: u64,
    decode_ns: u64,
    prefill_ns: u64,
    context_picoseconds: u64,
    pair_picoseconds: u64,
    state: u64,
}

impl Device {
    fn cpu() -> Self {
        Self {
            base_ns: 900_000,
            decode_ns: 220_000,
            prefill_ns: 70_000,
            context_picoseconds: 40_000,
            pair_picoseconds: 60_000,
            state: 1,
        }
    }

    fn gpu() -> Self {
        Self {
            base_ns: 6_000_000,
            decode_ns: 14_000,
            prefill_ns: 22_000,
            context_picoseconds: 60,
            pair_picoseconds: 20,
            state: 7,
        }
    }

    fn random(&mut self, below: u64) -> u64 {
        self.state = self.state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.state >> 33) % below
    }

    fn time(&self, shape: StepShape) -> u64 {
        self.base_ns
            + self.decode_ns * u64::from(shape.decodes)
            + self.prefill_ns * u64::from(shape.prefill_tokens)
            + self.context_picoseconds * shape.context_tokens / 1_000
            + self.pair_picoseconds * shape.prefill_pairs / 1_000
    }

    /// Three steps of four decode only, as in a real mix.
    fn shape(&mut self) -> StepShape {
        let decodes = self.random(200) as u32;
        let prefill_tokens = if self.random(4) == 0 { 1 + self.random(2_000) as u32 } else { 0 };
        let context_tokens = u64::from(decodes) * (100 + self.random(1_500));
        let prefill_pairs = StepShape::pairs(self.random(1_500) as u32, prefill_tokens);
        let decodes = decodes.max(u32::from(prefill_tokens == 0));
        StepShape { decodes, prefill_tokens, context_tokens, prefill_pairs }
    }

    fn train(&mut self, model: &mut CostModel, steps: usize) {
        for _ in 0..steps {
            let shape = self.shape();
            model.observe(shape, self.time(shape));
        }
    }
}

fn within(model: &CostModel, device: &mut Device, percent: u64) {
    for _ in 0..200 {
        let shape = device.shape();
        let (predicted, truth) = (model.predict_step(shape), device.time(shape));
        assert!(
            predicted.abs_diff(truth) * 100 <= truth * percent,
            "{shape:?}: predicted {predicted}, took {truth}, {model:?}"
        );
    }
}

fn within_on_the_whole(model: &CostModel, device: &mut Device, percent: u64) {
    let shapes: Vec<StepShape> = (0..200).map(|_| device.shape()).collect();
    let truth: u64 = shapes.iter().map(|&shape| device.time(shape)).sum();
    let error: u64 = shapes.iter().map(|&shape| model.predict_step(shape).abs_diff(device.time(shape))).sum();
    assert!(error * 100 <= truth * percent, "off by {error} of {truth}, {model:?}");
}

#[test]
fn fifty_steps_teach_a_linear_device_to_within_fifteen_percent() {
    for mut device in [Device::cpu(), Device::gpu()] {
        let mut model = CostModel::new();
        device.train(&mut model, 50);
        within(&model, &mut device, 15);
    }
}

#[test]
fn a_twofold_slowdown_is_followed_within_a_hundred_steps() {
    for mut device in [Device::cpu(), Device::gpu()] {
        let mut model = CostModel::new();
        device.train(&mut model, 200);
        device.base_ns *= 2;
        device.decode_ns *= 2;
        device.prefill_ns *= 2;
        device.context_picoseconds *= 2;
        device.pair_picoseconds *= 2;
        device.train(&mut model, 100);
        within(&model, &mut device, 15);
    }
}

#[test]
fn a_hundredfold_slowdown_is_followed_too() {
    let mut device = Device::gpu();
    let mut model = CostModel::new();
    device.train(&mut model, 200);
    device.base_ns *= 100;
    device.decode_ns *= 100;
    device.prefill_ns *= 100;
    device.context_picoseconds *= 100;
    device.pair_picoseconds *= 100;
    device.train(&mut model, 300);
    within(&model, &mut device, 15);
}

#[test]
fn single_stalls_and_freak_short_times_move_predictions_little() {
    for factor in [(1_000, 1), (1, 1_000)] {
        let mut device = Device::cpu();
        let mut model = CostModel::new();
        device.train(&mut model, 100);
        for _ in 0..20 {
            let shape = device.shape();
            let time = device.time(shape) * factor.0 / factor.1;
            model.observe(shape, time);
            within_on_the_whole(&model, &mut device, 20);
            device.train(&mut model, 40);
        }
    }
}

#[test]
fn ten_percent_noise_leaves_predictions_within_fifteen_percent() {
    let mut device = Device::cpu();
    let mut model = CostModel::new();
    for _ in 0..200 {
        let shape = device.shape();
        let noisy = device.time(shape) * (90 + device.random(21)) / 100;
        model.observe(shape, noisy);
    }
    within(&model, &mut device, 15);
}

#[test]
fn equal_steps_are_learned_exactly_though_their_parts_are_not() {
    let mut model = CostModel::new();
    let shape = StepShape { decodes: 64, context_tokens: 64_000, ..StepShape::default() };
    for _ in 0..50 {
        model.observe(shape, 9_000_000);
    }
    assert!(model.predict_step(shape).abs_diff(9_000_000) < 90_000);
    assert!(model.predict_decode_step(64).abs_diff(9_000_000) < 900_000);
}

#[test]
fn prefill_costs_survive_a_long_time_of_decoding() {
    let mut device = Device::gpu();
    let mut model = CostModel::new();
    device.train(&mut model, 100);
    let before = model.predict_prefill(4_000);
    for _ in 0..5_000 {
        let shape = StepShape { decodes: 100, context_tokens: 100_000, ..StepShape::default() };
        model.observe(shape, device.time(shape));
    }
    let after = model.predict_prefill(4_000);
    assert!(before.abs_diff(after) * 5 < before, "{before} became {after}");
}

#[test]
fn defaults_are_sane_before_anything_was_observed() {
    let model = CostModel::new();
    assert_eq!(model.predict_prefill(0), 2_000_000);
    assert_eq!(model.predict_prefill(1_000) / 1_000, 52_000);
    assert_eq!(model.predict_decode_step(1) / 1_000, 2_054);
    assert_eq!(model.observations(), 0);
}

fn any_shape() -> impl Strategy<Value = StepShape> {
    (any::<u32>(), any::<u32>(), any::<u64>(), any::<u64>(), 0_u32..64).prop_map(
        |(decodes, prefill_tokens, context, pairs, shift)| StepShape {
            decodes: decodes >> (shift / 2),
            prefill_tokens: prefill_tokens >> (shift / 2),
            context_tokens: context >> shift,
            prefill_pairs: pairs >> shift,
        },
    )
}

proptest! {
    #[test]
    fn no_observation_overflows_and_predictions_stay_in_range_and_monotone(
        observations in prop::collection::vec((any_shape(), any::<u64>(), 0_u32..64), 0..60),
        shape in any_shape(),
        more in any_shape(),
    ) {
        let mut model = CostModel::new();
        for (shape, elapsed_ns, shift) in observations {
            model.observe(shape, elapsed_ns >> shift);
        }
        let larger = StepShape {
            decodes: shape.decodes.saturating_add(more.decodes),
            prefill_tokens: shape.prefill_tokens.saturating_add(more.prefill_tokens),
            context_tokens: shape.context_tokens.saturating_add(more.context_tokens),
            prefill_pairs: shape.prefill_pairs.saturating_add(more.prefill_pairs),
        };
        let (small, large) = (model.predict_step(shape), model.predict_step(larger));
        prop_assert!((LEAST_NS..=MOST_NS).contains(&small));
        prop_assert!((LEAST_NS..=MOST_NS).contains(&large));
        prop_assert!(small <= large);
        prop_assert!(model.predict_prefill(shape.prefill_tokens) <= model.predict_prefill(larger.prefill_tokens));
        prop_assert!(model.predict_decode_step(shape.decodes) <= model.predict_decode_step(larger.decodes));
    }
}

#[test]
fn chunks_of_a_long_prompt_get_shorter_as_its_attention_grows() {
    let mut device = Device::cpu();
    let mut model = CostModel::new();
    device.train(&mut model, 200);
    let [first, last] = [0, 8_000].map(|start| model.prefill_within(start, 20_000_000, 4_000));
    for (start, tokens) in [(0, first), (8_000, last)] {
        let truth = device.time(StepShape::prefill(start, tokens)) - device.base_ns;
        assert!((17_000_000..23_000_000).contains(&truth), "{tokens} tokens from {start} take {truth} ns");
    }
    assert!(last * 3 < first, "{first} tokens, then {last}");
}

#[test]
fn several_prompts_take_less_than_one_of_their_length() {
    let mut device = Device::cpu();
    let mut model = CostModel::new();
    device.train(&mut model, 200);
    let (one, many) = (model.predict_prompts(8_000, 1), model.predict_prompts(8_000, 100));
    assert_eq!(one, model.predict_prefill(8_000));
    assert!(many * 3 < one * 2, "{many} of {one}");
    assert_eq!(model.predict_prompts(0, 0), model.predict_prefill(0));
}

#[test]
fn pairs_are_counted_one_by_one() {
    for (start, tokens) in [(0, 0), (0, 1), (7, 0), (5, 3), (100, 33)] {
        let counted: u64 = (0..tokens).map(|token| u64::from(start + token + 1)).sum();
        assert_eq!(StepShape::pairs(start, tokens), counted);
    }
    assert_eq!(StepShape::pairs(u32::MAX, u32::MAX), u64::MAX);
}

proptest! {
    #[test]
    fn what_fits_a_time_is_the_most_that_does(
        observations in prop::collection::vec((any_shape(), any::<u64>(), 0_u32..64), 0..40),
        start_tokens in 0_u32..(1 << 21),
        nanoseconds in 0_u64..(1 << 36),
        most in 0_u32..100_000,
    ) {
        let mut model = CostModel::new();
        for (shape, elapsed_ns, shift) in observations {
            model.observe(shape, elapsed_ns >> shift);
        }
        let tokens = model.prefill_within(start_tokens, nanoseconds, most);
        prop_assert!(tokens <= most);
        prop_assert!(model.added_by_prefill(start_tokens, tokens) <= nanoseconds);
        if tokens < most {
            prop_assert!(model.added_by_prefill(start_tokens, tokens + 1) > nanoseconds);
        }
        // The sum of two chunks is the chunk of both, rounding apart.
        let half = tokens / 2;
        let parts = model.added_by_prefill(start_tokens, half)
            + model.added_by_prefill(start_tokens + half, tokens - half);
        prop_assert!(parts.abs_diff(model.added_by_prefill(start_tokens, tokens)) <= 1);
    }
}
