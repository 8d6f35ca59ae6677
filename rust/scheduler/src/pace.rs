//! How long prefill may make a step, from what is known when the step is planned (ADR 0022): beside streams what it adds is
//! bounded, so that none of them waits long for a prompt; with nobody to wait but who comes next, the bound is wider. O(1)
//! per step. Knows nothing of which sequence is computed: that is the policy's, and how much of it fits the budget's.

use crate::budget::Budget;
use crate::replica::Replica;
use llmscale_cost::StepShape;
use llmscale_types::Duration;

/// How long prefill may make steps.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Pace {
    /// What it may add to a step with streams, in nanoseconds. `None` bounds nothing.
    target_ns: Option<u64>,
}

/// Without streams a step may take this many times the target: only who arrives in the middle of it waits.
const ALONE: u64 = 4;
/// Beside streams, a step takes at most this many times the prefill tokens of the largest one so far: the prior may be wrong.
const MAX_GROWTH: u32 = 2;

impl Pace {
    /// No bound in time: nobody waits, as in offline use.
    pub const NONE: Self = Self { target_ns: None };

    /// Prefill adds about this much to a step at most; zero bounds nothing.
    pub fn of(target: Duration) -> Self {
        Self { target_ns: (target.0 > 0).then(|| target.0.saturating_mul(1_000)) }
    }

    /// What prefill may add to a step whose streams take `decode_ns`: the target, or as long as they take if that is longer.
    /// So streams keep half their speed under any load of prompts, and many streams on a slow machine leave prompts half.
    fn beside_streams(target_ns: u64, decode_ns: u64) -> u64 {
        target_ns.max(decode_ns)
    }
}

impl Replica {
    /// Sets how long prefill may make steps; without, only tokens bound them.
    #[must_use]
    pub fn with_pace(mut self, pace: Pace) -> Self {
        self.pace = pace;
        self
    }

    /// What the step that is being planned takes besides the decode rows that it has.
    pub(crate) fn step_budget(&self, decodes: StepShape) -> Budget {
        let (tokens, block_tokens) = (self.limits.max_step_tokens - decodes.decodes, self.limits.block_tokens);
        let Some(target_ns) = self.pace.target_ns else { return Budget::of_tokens(tokens) };
        // A step of one group of a pipeline keeps the streams of the others waiting too.
        if self.groups.iter().all(|group| group.decoding == 0) {
            return Budget::of_tokens(tokens).within(target_ns.saturating_mul(ALONE), block_tokens);
        }
        let decode_ns = if decodes.decodes > 0 { self.cost.predict_step(decodes) } else { 0 };
        let known = self.cost.known_prefill_tokens().saturating_mul(MAX_GROWTH).max(block_tokens);
        Budget::of_tokens(tokens.min(known)).within(Pace::beside_streams(target_ns, decode_ns), block_tokens)
    }

    /// How long streams decode in the steps that so much prefill is spread over.
    pub(crate) fn decoding_beside_ns(&self, prefill_ns: u64) -> u64 {
        let Some(target_ns) = self.pace.target_ns else { return 0 };
        let decoding: u32 = self.groups.iter().map(|group| group.decoding).sum();
        if decoding == 0 {
            return 0;
        }
        let decode_ns = self.cost.predict_decode_step(decoding);
        let steps = prefill_ns / Pace::beside_streams(target_ns, decode_ns);
        steps.saturating_mul(decode_ns)
    }
}
