//! What a step that is being planned may still take: tokens, which the workers' buffers hold, and prefill time, which those
//! who have rows in the step wait. An answer costs about twenty predictions if time is bounded, nothing else. Knows nothing
//! of sequences, nor of where its bounds come from (`pace`).

use llmscale_cost::CostModel;

/// Chunks that time cuts are whole multiples of this many tokens, or of a block if that is shorter: kernels compute rows
/// in tiles, and a sliver of the next prompt would hold its blocks for nothing.
const QUANTUM_TOKENS: u32 = 16;

/// See the file's header.
#[derive(Clone, Debug)]
pub(crate) struct Budget {
    tokens: u32,
    time: Option<TimeLeft>,
    cut: bool,
}

#[derive(Clone, Debug)]
struct TimeLeft {
    nanoseconds: u64,
    /// Tokens of a block, which the step's first prefill may take whatever is predicted; `None` when it has.
    first: Option<u32>,
    quantum_tokens: u32,
}

impl Budget {
    /// As many tokens, whatever they take.
    pub(crate) fn of_tokens(tokens: u32) -> Self {
        Self { tokens, time: None, cut: false }
    }

    /// The same, but prefill takes at most this long by prediction, or is one block of so many tokens.
    pub(crate) fn within(self, nanoseconds: u64, block_tokens: u32) -> Self {
        let quantum_tokens = QUANTUM_TOKENS.min(block_tokens);
        Self { time: Some(TimeLeft { nanoseconds, first: Some(block_tokens), quantum_tokens }), ..self }
    }

    /// How many of `wanted` tokens behind the first `start_tokens` of a context the step takes.
    pub(crate) fn fitting(&mut self, cost: &CostModel, start_tokens: u32, wanted: u32) -> u32 {
        let most = wanted.min(self.tokens);
        let Some(time) = &self.time else { return most };
        let mut fitting = cost.prefill_within(start_tokens, time.nanoseconds, most);
        if fitting < most {
            self.cut = true;
            fitting -= fitting % time.quantum_tokens;
        }
        fitting.max(time.first.unwrap_or(0).min(most))
    }

    /// The step takes so many tokens there, or what costs as much.
    pub(crate) fn take(&mut self, cost: &CostModel, start_tokens: u32, tokens: u32) {
        self.tokens -= tokens;
        let Some(time) = &mut self.time else { return };
        if tokens > 0 {
            time.first = None;
        }
        time.nanoseconds = time.nanoseconds.saturating_sub(cost.added_by_prefill(start_tokens, tokens));
        if time.first.is_none() && time.nanoseconds < cost.added_by_prefill(0, time.quantum_tokens) {
            // Not even the start of a prompt fits any more, and nothing is cheaper.
            self.cut |= self.tokens > 0;
            self.tokens = 0;
        }
    }

    /// The step takes nothing more.
    pub(crate) fn exhaust(&mut self) {
        self.tokens = 0;
    }

    /// Whether it takes nothing more.
    pub(crate) fn is_spent(&self) -> bool {
        self.tokens == 0
    }

    /// Whether time, and not tokens, has refused anything.
    pub(crate) fn is_cut(&self) -> bool {
        self.cut
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use llmscale_cost::StepShape;
    use proptest::prelude::*;

    /// A device of a millisecond a step, `token_ns` a token and `pair_ns` a pair.
    fn cost(token_ns: u64, pair_ns: u64) -> CostModel {
        let mut cost = CostModel::new();
        for step in 0..200_u32 {
            let shape = StepShape::prefill(step * 37 % 900, 1 + step * 53 % 400);
            let prefill_ns = token_ns * u64::from(shape.prefill_tokens) + pair_ns * shape.prefill_pairs;
            cost.observe(shape, 1_000_000 + prefill_ns);
        }
        cost
    }

    #[test]
    fn without_a_bound_in_time_tokens_alone_count() {
        let (cost, mut budget) = (cost(50_000, 100), Budget::of_tokens(100));
        assert_eq!(budget.fitting(&cost, 0, 60), 60);
        budget.take(&cost, 0, 60);
        assert_eq!(budget.fitting(&cost, 0, 60), 40);
        budget.take(&cost, 0, 40);
        assert!(budget.is_spent() && !budget.is_cut());
    }

    #[test]
    fn the_first_prefill_of_a_step_gets_a_block_and_the_second_nothing_when_time_is_over() {
        let (cost, mut budget) = (cost(50_000, 100), Budget::of_tokens(500).within(100, 32));
        assert_eq!(budget.fitting(&cost, 0, 20), 20, "no more than there is");
        assert_eq!(budget.fitting(&cost, 0, 400), 32);
        budget.take(&cost, 0, 32);
        assert_eq!(budget.fitting(&cost, 0, 400), 0);
        assert!(budget.is_spent() && budget.is_cut());
    }

    #[test]
    fn a_rest_that_is_no_quantum_is_not_planned_but_the_end_of_a_context_is() {
        let (cost, mut budget) = (cost(50_000, 0), Budget::of_tokens(500).within(5_000_000, 32));
        let fitting = budget.fitting(&cost, 0, 400);
        assert!((80..=112).contains(&fitting) && fitting.is_multiple_of(16), "{fitting}");
        assert_eq!(budget.fitting(&cost, 0, 37), 37);
    }

    proptest! {
        #[test]
        fn what_a_step_takes_is_within_its_bounds_or_one_block(
            token_ns in 1_000_u64..1_000_000,
            pair_ns in 0_u64..2_000,
            nanoseconds in 0_u64..100_000_000,
            tokens in 1_u32..2_000,
            contexts in prop::collection::vec((0_u32..5_000, 1_u32..3_000), 1..20),
        ) {
            let cost = cost(token_ns, pair_ns);
            let mut budget = Budget::of_tokens(tokens).within(nanoseconds, 32);
            let (mut taken, mut predicted_ns, mut chunks) = (0, 0, 0);
            for (start, rest) in contexts {
                let fitting = budget.fitting(&cost, start, rest);
                prop_assert!(fitting <= rest);
                if fitting == 0 {
                    continue;
                }
                budget.take(&cost, start, fitting);
                taken += fitting;
                chunks += 1;
                predicted_ns += cost.added_by_prefill(start, fitting);
            }
            prop_assert!(chunks > 0, "the first always gets something");
            prop_assert!(taken <= tokens);
            prop_assert!(predicted_ns <= nanoseconds || (chunks == 1 && taken <= 32));
            if taken < tokens && budget.is_spent() {
                prop_assert!(budget.is_cut());
            }
        }
    }
}
