//! The time of a step as `base + a * decodes + b * prefill_tokens + c * context_tokens + d * prefill_pairs`, with
//! coefficients that are never negative, hence monotone in every count. Fitted by exponentially forgetting least squares on relative errors:
//! the moments of the last ~32 steps are kept, and a few rounds of coordinate descent move the coefficients after each.
//! All numbers are fixed-point integers. Knows nothing of what the steps computed.

use crate::shape::StepShape;

const TERMS: usize = 5;
/// Nanoseconds per unit of each coefficient, so that the coefficients of real devices are around one.
const UNIT_NS: [u64; TERMS] = [1 << 20, 1 << 14, 1 << 14, 1 << 4, 1 << 4];
/// Before anything was observed: 2 ms per step, 50 us per decoded token, 50 us per prefilled token, 8 ns per token of
/// context; a small model on a CPU. What a prefilled token attends to is free until it is seen to cost. A GPU is one to two orders faster
/// and known after a few steps.
const DEFAULT_NS: [u64; TERMS] = [2_000_000, 50_000, 50_000, 8, 0];
/// Context of a sequence before any decoding step was observed.
const DEFAULT_CONTEXT_TOKENS: u64 = 512;
/// Fraction bits of a coefficient.
const COEFFICIENT_BITS: u32 = 24;
/// Fraction bits of a feature, once divided by the step's time.
const FEATURE_BITS: u32 = 20;
/// Each step fades what was learned by 1/32: long enough to average noise.
const FORGETTING_SHIFT: u32 = 5;
/// From the second surprise in a row on, if they err to the same side, a step fades what was learned by 1/8: one stall
/// costs little, a lasting change is followed within tens of steps.
const FAST_FORGETTING_SHIFT: u32 = 3;
/// Observations that are taken as they are; later ones are clamped.
const WARM_UP: u64 = 8;
/// A later observation is a surprise if it took 1.5 times what was predicted, or two thirds of it. The first counts as no more
/// than that, the ones that follow it as twice or half, so that one stall moves the model little and a lasting change moves it
/// geometrically.
const SURPRISE: (u64, u64) = (3, 2);
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
    /// Whether the last step was a surprise, and whether it took longer.
    surprised: Option<bool>,
    /// Most tokens that were prefilled in one step.
    known_prefill_tokens: u32,
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
            surprised: None,
            known_prefill_tokens: 0,
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
            let (above, below) =
                (predicted.saturating_mul(SURPRISE.0) / SURPRISE.1, predicted * SURPRISE.1 / SURPRISE.0);
            let surprised = (measured > above || measured < below).then_some(measured > above);
            if surprised.is_some() && surprised == self.surprised {
                measured = measured.clamp(predicted / MAX_SURPRISE, predicted * MAX_SURPRISE);
                forgetting_shift = FAST_FORGETTING_SHIFT;
            } else {
                measured = measured.clamp(below, above);
            }
            self.surprised = surprised;
            measured = measured.max(LEAST_NS);
            // Errors count relative to the step's time, or the long steps would drown the short ones. Dividing by the
            // prediction and not by the measurement keeps a freak short time from weighing fourfold.
            scale = predicted;
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
        self.known_prefill_tokens = self.known_prefill_tokens.max(shape.prefill_tokens);
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
        self.predict_step(StepShape::prefill(0, tokens))
    }

    /// Predicted time to compute `prompts` prompts of `tokens` tokens in all, as if they were equally long.
    pub fn predict_prompts(&self, tokens: u32, prompts: u32) -> u64 {
        let prompts = prompts.clamp(1, tokens.max(1));
        let prefill_pairs = StepShape::pairs(0, tokens.div_ceil(prompts)).saturating_mul(u64::from(prompts));
        self.predict_step(StepShape { prefill_tokens: tokens, prefill_pairs, ..StepShape::default() })
    }

    /// How many tokens of a context, behind its first `start_tokens`, a step prefills within this time, `most` at most.
    pub fn prefill_within(&self, start_tokens: u32, nanoseconds: u64, most: u32) -> u32 {
        let budget = u128::from(nanoseconds) << COEFFICIENT_BITS;
        let fits = |tokens: u32| self.scaled_time(StepShape::prefill(start_tokens, tokens).features(), 1) <= budget;
        let (mut fitting, mut above) = (0, most.saturating_add(1));
        while above - fitting > 1 {
            let middle = fitting + (above - fitting) / 2;
            if fits(middle) { fitting = middle } else { above = middle }
        }
        fitting
    }

    /// What prefilling so many tokens there adds to a step.
    pub fn added_by_prefill(&self, start_tokens: u32, tokens: u32) -> u64 {
        let sum = self.scaled_time(StepShape::prefill(start_tokens, tokens).features(), 1);
        u64::try_from(sum.div_ceil(1 << COEFFICIENT_BITS)).unwrap_or(u64::MAX).min(MOST_NS)
    }

    /// Predicted time of a step that decodes this many sequences of the usual length.
    pub fn predict_decode_step(&self, running: u32) -> u64 {
        let context_tokens = u64::from(running).saturating_mul(self.context_per_decode_tokens);
        self.predict_step(StepShape { decodes: running, context_tokens, ..StepShape::default() })
    }

    /// Steps that were observed.
    pub fn observations(&self) -> u64 {
        self.observations
    }

    /// Most tokens that were prefilled in one step: beyond, predictions are extrapolated.
    pub fn known_prefill_tokens(&self) -> u32 {
        self.known_prefill_tokens
    }

    fn predict(&self, features: [u64; TERMS]) -> u64 {
        let sum = self.scaled_time(features, 0);
        u64::try_from(sum >> COEFFICIENT_BITS).unwrap_or(u64::MAX).clamp(LEAST_NS, MOST_NS)
    }

    /// The terms from `first` on, in nanoseconds times two to the `COEFFICIENT_BITS`.
    fn scaled_time(&self, features: [u64; TERMS], first: usize) -> u128 {
        (first..TERMS)
            .map(|term| u128::from(features[term]) * u128::from(UNIT_NS[term]) * self.coefficients[term].unsigned_abs())
            .sum()
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
mod tests;
