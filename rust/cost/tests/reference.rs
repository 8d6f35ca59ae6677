//! Goal: the fit in integers, a few rounds a step, is the least-squares fit. Method: the same steps, fitted by a reference in
//! floats; both predict the same.

use llmscale_cost::{CostModel, StepShape};

const TERMS: usize = 5;

fn features(shape: StepShape) -> [f64; TERMS] {
    let counts = [1, shape.decodes.into(), shape.prefill_tokens.into(), shape.context_tokens, shape.prefill_pairs];
    counts.map(|count: u64| count as f64)
}

/// The same fit as floats and without shortcuts: every step with the weight that it has after those behind it, and descent
/// until nothing moves.
struct Reference {
    steps: Vec<([f64; TERMS], f64)>,
}

impl Reference {
    fn observe(&mut self, shape: StepShape, elapsed_ns: u64, scale_ns: u64) {
        let scale = scale_ns as f64;
        self.steps.push((features(shape).map(|feature| feature / scale), elapsed_ns as f64 / scale));
    }

    fn coefficients(&self) -> [f64; TERMS] {
        let (mut moments, mut responses) = ([[0.0; TERMS]; TERMS], [0.0; TERMS]);
        for (age, (features, target)) in self.steps.iter().rev().enumerate() {
            let weight = (31.0_f64 / 32.0).powi(age as i32);
            for row in 0..TERMS {
                responses[row] += weight * features[row] * target;
                for column in 0..TERMS {
                    moments[row][column] += weight * features[row] * features[column];
                }
            }
        }
        let mut found = [0.0; TERMS];
        for _ in 0..20_000 {
            for term in 0..TERMS {
                let others: f64 =
                    (0..TERMS).filter(|&other| other != term).map(|other| moments[term][other] * found[other]).sum();
                if moments[term][term] > 0.0 {
                    found[term] = ((responses[term] - others) / moments[term][term]).max(0.0);
                }
            }
        }
        found
    }

    fn predict(coefficients: &[f64; TERMS], shape: StepShape) -> f64 {
        features(shape).iter().zip(coefficients).map(|(feature, coefficient)| feature * coefficient).sum()
    }
}

/// Steps of a device: three of four decode only, and times are off by up to a twentieth.
struct Device {
    /// Picoseconds of a step, a decoded token, a prefilled one, a token of context, a pair.
    picoseconds: [u64; TERMS],
    state: u64,
}

impl Device {
    fn random(&mut self, below: u64) -> u64 {
        self.state = self.state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.state >> 33) % below
    }

    fn shape(&mut self) -> StepShape {
        let prefill_tokens = if self.random(4) == 0 { 1 + self.random(2_000) as u32 } else { 0 };
        let decodes = self.random(200) as u32 + u32::from(prefill_tokens == 0);
        let context_tokens = u64::from(decodes) * (100 + self.random(1_500));
        let prefill_pairs = StepShape::pairs(self.random(1_500) as u32, prefill_tokens);
        StepShape { decodes, prefill_tokens, context_tokens, prefill_pairs }
    }

    fn noisy_time(&mut self, shape: StepShape) -> u64 {
        let exact: f64 = features(shape).iter().zip(self.picoseconds).map(|(feature, one)| feature * one as f64).sum();
        exact as u64 / 1_000 * (95 + self.random(11)) / 100
    }
}

#[test]
fn the_fit_agrees_with_one_in_floats_that_is_solved_to_the_end() {
    let cpu = [900_000_000, 220_000_000, 70_000_000, 40_000, 60_000];
    let gpu = [6_000_000_000, 14_000_000, 22_000_000, 60, 20];
    for picoseconds in [cpu, gpu] {
        let mut device = Device { picoseconds, state: 1 };
        let (mut model, mut reference) = (CostModel::new(), Reference { steps: Vec::new() });
        for step in 0..400 {
            let shape = device.shape();
            let measured = device.noisy_time(shape);
            // What an error is relative to: the measurement at first, then the prediction.
            let scale = if step < 8 { measured } else { model.predict_step(shape) };
            model.observe(shape, measured);
            reference.observe(shape, measured, scale);
        }
        let exact = reference.coefficients();
        for _ in 0..200 {
            let shape = device.shape();
            let (ours, theirs) = (model.predict_step(shape) as f64, Reference::predict(&exact, shape));
            assert!((ours - theirs).abs() <= 0.05 * theirs, "{shape:?}: {ours} and {theirs}, {model:?}, {exact:?}");
        }
    }
}
