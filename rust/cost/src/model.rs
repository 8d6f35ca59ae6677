//! The time of a step as `base + a * decodes + b * prefill_tokens + c * context_tokens`, with coefficients that are never
//! negative, hence monotone in every count. Fitted by exponentially forgetting least squares on relative errors:
//! the moments of the last ~32 steps are kept, and a few rounds of coordinate descent move the coefficients after each.
//! All numbers are fixed-point integers. Knows nothing of what the steps computed.

use crate::shape::StepShape;

const TERMS: usize = 4;
/// Nanoseconds per unit of each coefficient, so that the coefficients of real devices are around one.
const UNIT_NS: [u64; TERMS] = [1 << 20, 1 << 14, 1 << 14, 1 << 4];
/// Before anything was observed: 2 ms per step, 50 us per decoded token, 50 us per prefilled token, 8 ns per token of
/// context; a small model on a CPU. A GPU is one to two orders faster and known after a few steps.
const DEFAULT_NS: [u64; TERMS] = [2_000_000, 50_000, 50_000, 8];
/// Context of a sequence before any decoding step was observed.
const DEFAULT_CONTEXT_TOKENS: u64 = 512;
/// Fraction bits of a coefficient.
const COEFFICIENT_BITS: u32 = 24;
/// Fraction bits of a feature, once divided by the step's time.
const FEATURE_BITS: u32 = 20;
/// Each step fades what was learned by 1/32: long enough to average noise.
const FORGETTING_SHIFT: u32 = 5;
/// A step that took more than 1.5 times or less than half of what was predicted fades it by 1/8: one such step costs
/// little, a lasting change is followed within tens of steps.
const FAST_FORGETTING_SHIFT: u32 = 3;
/// Observations that are taken as they are; later ones are clamped.
const WARM_UP: u64 = 8;
/// Later observations count at most this many times (or this fraction of) what was predicted, so that one stall
/// moves the model little and a lasting change moves it geometrically.
const MAX_SURPRISE: u64 = 2;
/// Rounds of coordinate descent per observation. It starts from the last solution, so few are enough.
const ROUNDS: usize = 6;
const LEAST_NS: u64 = 1_000;
const MOST_NS: u64 = 1 << 40;
const MOST_FEATURE: u128 = 1 << 32;
const MOST_COEFFICIENT: i128 = 1 << 40;
/// A term whose features of the last steps are all below about 1/1024 of the step's time is left as it is.
const LEAST_EVIDENCE: i128 = 1 << 20;

/// Learns how long steps take on one replica.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct CostModel {
    coefficients: [i128; TERMS],
    /// Sums of products of features, newest heaviest.
    moments: [[i128; TERMS]; TERMS],
    /// Sums of products of features and target.
    responses: [i128; TERMS],
    observations: u64,
    context_per_decode_tokens: u64,
}

impl Default for CostModel {
    fn default() -> Self {
        Self::new()
    }
}

impl CostModel {
    /// A model that predicts the defaults.
    pub fn new() -> Self {
        let mut model = Self {
            coefficients: [0; TERMS],
            moments: [[0; TERMS]; TERMS],
            responses: [0; TERMS],
            observations: 0,
            context_per_decode_tokens: DEFAULT_CONTEXT_TOKENS,
        };
        for term in 0..TERMS {
            model.coefficients[term] = ((DEFAULT_NS[term] << COEFFICIENT_BITS) / UNIT_NS[term]).into();
            // The defaults weigh as much as 1/4096 of one observation, and fade like one.
            model.moments[term][term] = 1 << (2 * FEATURE_BITS - 12);
            model.responses[term] = (model.moments[term][term] * model.coefficients[term]) >> COEFFICIENT_BITS;
        }
        model
    }

    /// Learns that a step of this shape took `elapsed_ns`.
    pub fn observe(&mut self, shape: StepShape, elapsed_ns: u64) {
        let features = shape.features();
        let predicted = self.predict(features);
        let mut measured = elapsed_ns.clamp(LEAST_NS, MOST_NS);
        let mut scale = measured;
        let mut forgetting_shift = FORGETTING_SHIFT;
        if self.observations >= WARM_UP {
            measured = measured.clamp(predicted / MAX_SURPRISE, predicted.saturating_mul(MAX_SURPRISE)).max(LEAST_NS);
            // Errors count relative to the step's time, or the long steps would drown the short ones. Dividing by the
            // prediction and not by the measurement keeps a freak short time from weighing fourfold.
            scale = predicted;
            if measured.abs_diff(predicted) > predicted / 2 {
                forgetting_shift = FAST_FORGETTING_SHIFT;
            }
        }
        let scaled: [i128; TERMS] = std::array::from_fn(|term| {
            let feature =
                ((u128::from(features[term]) * u128::from(UNIT_NS[term])) << FEATURE_BITS) / u128::from(scale);
            feature.min(MOST_FEATURE) as i128
        });
        let target = ((u128::from(measured) << FEATURE_BITS) / u128::from(scale)) as i128;
        for row in 0..TERMS {
            for column in 0..TERMS {
                fade_and_add(&mut self.moments[row][column], scaled[row] * scaled[column], forgetting_shift);
            }
            fade_and_add(&mut self.responses[row], scaled[row] * target, forgetting_shift);
        }
        self.solve();
        self.observations = self.observations.saturating_add(1);
        if shape.decodes > 0 && shape.prefill_tokens == 0 {
            let sample = features[3] / features[1];
            self.context_per_decode_tokens = (self.context_per_decode_tokens * 15 + sample).div_ceil(16);
        }
    }

    /// Predicted time of one step.
    pub fn predict_step(&self, shape: StepShape) -> u64 {
        self.predict(shape.features())
    }

    /// Predicted time to compute a prompt of this many tokens in one step of its own.
    pub fn predict_prefill(&self, tokens: u32) -> u64 {
        self.predict_step(StepShape { decodes: 0, prefill_tokens: tokens, context_tokens: u64::from(tokens) })
    }

    /// Predicted time of a step that decodes this many sequences of the usual length.
    pub fn predict_decode_step(&self, running: u32) -> u64 {
        let context_tokens = u64::from(running).saturating_mul(self.context_per_decode_tokens);
        self.predict_step(StepShape { decodes: running, prefill_tokens: 0, context_tokens })
    }

    /// Steps that were observed.
    pub fn observations(&self) -> u64 {
        self.observations
    }

    fn predict(&self, features: [u64; TERMS]) -> u64 {
        let sum: u128 = (0..TERMS)
            .map(|term| u128::from(features[term]) * u128::from(UNIT_NS[term]) * self.coefficients[term].unsigned_abs())
            .sum();
        u64::try_from(sum >> COEFFICIENT_BITS).unwrap_or(u64::MAX).clamp(LEAST_NS, MOST_NS)
    }

    /// Non-negative least squares on the moments by cyclic coordinate descent.
    fn solve(&mut self) {
        for _ in 0..ROUNDS {
            for term in 0..TERMS {
                let own = self.moments[term][term];
                if own < LEAST_EVIDENCE {
                    continue;
                }
                let others: i128 = (0..TERMS)
                    .filter(|&other| other != term)
                    .map(|other| self.moments[term][other] * self.coefficients[other])
                    .sum();
                let best = ((self.responses[term] << COEFFICIENT_BITS) - others) / own;
                self.coefficients[term] = best.clamp(0, MOST_COEFFICIENT);
            }
        }
    }
}

fn fade_and_add(sum: &mut i128, value: i128, forgetting_shift: u32) {
    *sum += value - (*sum >> forgetting_shift);
}

#[cfg(test)]
mod tests {
    use super::{CostModel, LEAST_NS, MOST_NS};
    use crate::shape::StepShape;
    use proptest::prelude::*;

    /// A device that is exactly linear, with noise and stalls on demand.
    struct Device {
        base_ns: u64,
        decode_ns: u64,
        prefill_ns: u64,
        context_picoseconds: u64,
        state: u64,
    }

    impl Device {
        fn cpu() -> Self {
            Self { base_ns: 900_000, decode_ns: 220_000, prefill_ns: 70_000, context_picoseconds: 40_000, state: 1 }
        }

        fn gpu() -> Self {
            Self { base_ns: 6_000_000, decode_ns: 14_000, prefill_ns: 22_000, context_picoseconds: 60, state: 7 }
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
        }

        /// Three steps of four decode only, as in a real mix.
        fn shape(&mut self) -> StepShape {
            let decodes = self.random(200) as u32;
            let prefill_tokens = if self.random(4) == 0 { 1 + self.random(2_000) as u32 } else { 0 };
            let context_tokens = u64::from(decodes) * (100 + self.random(1_500)) + u64::from(prefill_tokens);
            StepShape { decodes: decodes.max(u32::from(prefill_tokens == 0)), prefill_tokens, context_tokens }
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
        let shape = StepShape { decodes: 64, prefill_tokens: 0, context_tokens: 64_000 };
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
            let shape = StepShape { prefill_tokens: 0, decodes: 100, context_tokens: 100_000 };
            model.observe(shape, device.time(shape));
        }
        let after = model.predict_prefill(4_000);
        assert!(before.abs_diff(after) * 5 < before, "{before} became {after}");
    }

    #[test]
    fn defaults_are_sane_before_anything_was_observed() {
        let model = CostModel::new();
        assert_eq!(model.predict_prefill(0), 2_000_000);
        assert_eq!(model.predict_prefill(1_000) / 1_000, 52_008);
        assert_eq!(model.predict_decode_step(1) / 1_000, 2_054);
        assert_eq!(model.observations(), 0);
    }

    fn any_shape() -> impl Strategy<Value = StepShape> {
        (any::<u32>(), any::<u32>(), any::<u64>(), 0_u32..64).prop_map(|(decodes, prefill_tokens, context, shift)| {
            StepShape {
                decodes: decodes >> (shift / 2),
                prefill_tokens: prefill_tokens >> (shift / 2),
                context_tokens: context >> shift,
            }
        })
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
            };
            let (small, large) = (model.predict_step(shape), model.predict_step(larger));
            prop_assert!((LEAST_NS..=MOST_NS).contains(&small));
            prop_assert!((LEAST_NS..=MOST_NS).contains(&large));
            prop_assert!(small <= large);
            prop_assert!(model.predict_prefill(shape.prefill_tokens) <= model.predict_prefill(larger.prefill_tokens));
            prop_assert!(model.predict_decode_step(shape.decodes) <= model.predict_decode_step(larger.decodes));
        }
    }
}
